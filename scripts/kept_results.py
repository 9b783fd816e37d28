# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The results of a comparison, kept in a JSON file so that a stopped one goes on."""

import json
from pathlib import Path
from typing import Any


def go_on(path: Path, new: dict[str, Any], *settings: str) -> dict[str, Any]:
    """The results in a file, if there is one, or new ones.

    Args:
        path: of the JSON file, whose folder is made.
        new: results without any run.
        settings: of these names the file must have the values that are in `new`, since its runs were made with them.

    Raises:
        ValueError: it has others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the first run
    if not path.exists():
        return new
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name in settings:
        if earlier.get(name) != json.loads(json.dumps(new[name])):
            raise ValueError(f"{path} is of another {name}, {earlier.get(name)}: choose another --output")
    return earlier
