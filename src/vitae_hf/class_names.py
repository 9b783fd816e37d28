# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Names of classes: of a file, of ImageNet-1k, and how classes of one name are told apart."""

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

from .failures import of_a_missing_package


def distinct(names: Iterable[str], separator: str = "", key: Callable[[str], str] = str) -> list[str]:
    """Names of which no two are the same: the second of a name gets a 2 after the separator, the third a 3.

    Two classes of ImageNet-1k, a bird and a machine, are called crane. The Hub's `ILSVRC/imagenet-1k` calls them
    `crane` and `crane2`, too.

    Args:
        key: names are the same if this makes one text of them.
    """
    names = list(names)
    found: dict[str, str] = {}
    given = {key(name) for name in names}
    for name in names:
        others = (f"{name}{separator}{number}" for number in count(2))
        free = (other for other in others if key(other) not in found and key(other) not in given)
        unique = next(free) if key(name) in found else name
        found[key(unique)] = unique
    return list(found.values())


def imagenet_names() -> dict[str, str]:
    """The [`distinct`] names of ImageNet-1k's classes in their order, by synset: `n01440764` is `tench, Tinca tinca`.

    Raises:
        ImportError: timm, which has them, is not installed.
    """
    try:
        from timm.data import ImageNetInfo
    except ModuleNotFoundError as error:
        raise ImportError(of_a_missing_package(error, "the list of ImageNet's class names")) from error
    info = ImageNetInfo("imagenet-1k")
    return dict(zip(info.label_names(), distinct(info.label_descriptions())))


def read_class_names(file: Path) -> list[str]:
    """The lines of a file, the name of a class on each; `imagenet-1k` stands for ImageNet-1k's.

    Raises:
        ValueError: there is no such file, or a line is empty or there twice.
    """
    if not file.is_file():
        if file == Path("imagenet-1k"):
            return list(imagenet_names().values())
        raise ValueError(f"{file} is neither a file with a class on each line nor imagenet-1k")
    names: dict[str, None] = {}
    for name in file.read_text(encoding="utf-8-sig").rstrip("\n").splitlines():
        if not name.strip() or name in names:
            raise ValueError(f"line {len(names) + 1} of {file} must be the name of one more class, got {name!r}")
        names[name] = None
    return list(names)
