# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoints of a run are whole, when a run may have been killed while it wrote one."""

import json
import os
from pathlib import Path


def unfinished_mark(checkpoint: Path) -> Path:
    """The file that is beside a checkpoint until all of it is written."""
    return checkpoint.with_name(checkpoint.name + ".unfinished")


def updates(checkpoint: Path) -> int:
    """How many updates a whole checkpoint is the result of; -1 for anything else."""
    if unfinished_mark(checkpoint).exists():
        return -1
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return -1


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a run with the most updates that was written to its end, or none."""
    newest = max(Path(folder).glob("checkpoint-*"), key=updates, default=None)
    return None if newest is None or updates(newest) < 0 else newest


def flush(checkpoint: Path) -> None:
    """Let all of a checkpoint reach the disk, before an older one goes."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
