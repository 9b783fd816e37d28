# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoints of a killed run are whole, and which weights are no numbers."""

import json
import os
from pathlib import Path

import torch


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


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the weights and saved buffers, of this process's shards of them, that hold NaN or infinity."""
    local = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in model.state_dict().items()}
    local = {name: tensor for name, tensor in local.items() if tensor.is_floating_point() and not tensor.is_meta}
    if not local:
        return []
    device = next(iter(local.values())).device
    is_finite = torch.stack([tensor.isfinite().all().to(device, non_blocking=True) for tensor in local.values()])
    return [name for name, good in zip(local, is_finite.tolist()) if not good]
