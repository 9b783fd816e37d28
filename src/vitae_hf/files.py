# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Files that the package carries (recipes, pictures, a small trained model), and what is written whole or not."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes"
ASSETS = PACKAGE / "assets"
PICTURES = (ASSETS / "chelsea.png", ASSETS / "sneaker.png")  # a photograph, a small grey picture


def find_recipe(name: str | Path) -> Path:
    """A recipe by its path, or by the name of one that the package carries.

    Raises:
        ValueError: there is neither; the message lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    own = RECIPES / f"{name}.yaml"
    if not own.is_file():
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"--config {name} is neither a file nor one of the recipes {names}")
    return own


def find_model(name: str | Path) -> str:
    """Where `from_pretrained` and `pipeline` find a model: as they do, and by the name of one that the package carries.

    ```python
    >>> classify = pipeline("image-classification", model=find_model("vitae-nano-fashion"))
    ```

    Args:
        name: of a folder, of a model that the package carries, or of one on the Hub. The first of these that exists is
            taken.

    Returns:
        The path of the package's model, else the name as it is.
    """
    carried = {path.parent.name: path.parent for path in ASSETS.glob("*/config.json")}
    return str(name if Path(name).is_dir() else carried.get(str(name), name))


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def output_file(text: str) -> Path:
    """The type of an argument `--output`, for argparse: its folder is made now, and not after the work.

    Raises:
        OSError: it cannot be made.
    """
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_text(text: str, path: Path) -> None:
    """Write a text file anew. A process that is stopped on the way leaves the file as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_json(record: Any, path: Path, indent: int | None = 1) -> None:
    """Write a JSON file anew, as [`write_text`] does."""
    write_text(json.dumps(record, indent=indent) + "\n", path)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `output` when the block ends without an error.

    If anything fails, the new folder is deleted, so that a half-written folder never has the name `output`.

    Raises:
        OSError: something cannot be written, or there is a folder at `output` that is not empty.
    """
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
