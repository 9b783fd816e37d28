# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The results of a comparison, kept in a JSON file so that a stopped one goes on."""

import argparse
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
        ValueError: it has others, or the file is no such record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the first run
    if not path.exists():
        return new
    earlier = read_results(path, *new)
    for name in settings:
        if earlier[name] != json.loads(json.dumps(new[name])):
            raise ValueError(f"{path} is of another {name}, {earlier[name]}: choose another --output")
    return earlier


def read_results(path: Path, *names: str) -> dict[str, Any]:
    """The results in a file.

    Args:
        names: what a comparison of this kind has.

    Raises:
        ValueError: the file is no JSON, or has not all of that.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file that can be read: {error}") from error
    if missing := [name for name in names if not isinstance(results, dict) or name not in results]:
        raise ValueError(f"{path} is no record of this comparison: it has no {', no '.join(missing)}")
    return results


def share_and_epochs(text: str) -> tuple[float, float]:
    """The type of an argument `SHARE:EPOCHS`, for argparse."""
    try:
        share, epochs = map(float, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be SHARE:EPOCHS, such as 0.1:8, got {text!r}") from error
    return share, epochs


def positive(text: str) -> int:
    """The type of an argument that counts something, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
