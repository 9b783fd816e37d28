# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Files that the package carries: recipes, pictures to try a model on, and a small trained model."""

from pathlib import Path


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
        name: of a folder, of a model that the package carries, or of one on the Hub; the first of these that there is
            counts.

    Returns:
        The path of the package's model, else the name as it is.
    """
    carried = {path.parent.name: path.parent for path in ASSETS.glob("*/config.json")}
    return str(name if Path(name).is_dir() else carried.get(str(name), name))
