# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a local folder of pictures holds: which of its files belong to which split, and which pictures to which class.

`datasets` finds splits by keywords in paths. It puts files without a keyword into one of the splits or leaves them out,
without a warning. Here a folder with such files is an error. Links to folders are followed, and names may have any
characters.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from ..messages import listed


logger = logging.get_logger(__name__)

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words, in lower case, by which the name of a folder or shard tells its split, and the split that each means."""
PLAIN_WORDS = {"data", "dataset", "image", "images", "img", "imgs", "of", "part", "set", "shard", "split"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARDS = (".parquet", ".tar", ".arrow", ".zip")
NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")
"""How `datasets` names shards: `SPLIT-00000-of-00002.parquet`. The split may have any name."""


def split_of(name: str) -> str | None:
    """The split that a folder or shard is named after, such as `Training`, `val2017` or `test-00000-of-00002`."""
    words = [word for word in words_of(name) if word not in PLAIN_WORDS]
    return SPLITS.get(words[0]) if len(words) == 1 else None


def words_of(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", name.lower())


@dataclass
class Folder:
    """A local folder of class folders, of pictures with metadata, of pictures alone, or of shards.

    Attributes:
        path: of the folder.
    """

    path: Path

    @cached_property
    def contents(self) -> tuple[str, list[Path]]:
        """The kind, `"metadata"`, `"pictures"` or an ending of shards, and its files relative to the folder, in order.

        Raises:
            ValueError: there are none, or the name of one is no text.
        """
        found: dict[str, list[Path]] = {}
        for path in walk(self.path):
            if (kind := kind_of(path)) is not None:
                found.setdefault(kind, []).append(path.relative_to(self.path))
        if not found:
            raise ValueError(f"{self.path} holds no pictures and no parquet or tar files")
        kind = (
            "metadata"
            if "metadata" in found
            else Counter({kind: len(found[kind]) for kind in found}).most_common()[0][0]
        )
        files = found[kind] + (found.get("pictures", []) if kind == "metadata" else [])
        return kind, sorted(files)

    @cached_property
    def splits(self) -> dict[str, tuple[Path, list[Path]]]:
        """For each split its own folder, and its files, relative to that folder.

        Raises:
            ValueError: what belongs to which split cannot be told; the message lists what was found.
        """
        kind, files = self.contents
        root = self.path
        while len({file.parts[0] for file in files}) == 1 and min(len(file.parts) for file in files) > 2:
            if split_of(files[0].parts[0]):
                break
            root, files = root / files[0].parts[0], [Path(*file.parts[1:]) for file in files]
        folders = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        if not (named := self._named(folders)):
            self._check_below(root, files)
            return self._splits_of_shards(root, files) if kind in SHARDS else {"train": (root, files)}
        self._check(root, named, sorted({file.parts[0] for file in files} - named.keys()))
        said = ", ".join(f"{folder} is {split}" for folder, split in named.items())
        logger.warning_once(f"splits of {root}: {said}")
        parts: dict[str, tuple[Path, list[Path]]] = {split: (root / folder, []) for folder, split in named.items()}
        for file in files:
            parts[named[file.parts[0]]][1].append(Path(*file.parts[1:]))
        return {split: parts[split] for split in ("train", "validation", "test") if split in parts}

    def _named(self, folders: list[str]) -> dict[str, str]:
        """The folders that hold a split each, and which split.

        These are the folders that are called as a split is. If there are none, names may have other words too, as
        `my_train_images` and `my_test_images`: all folders are then splits, if each name has a word for another one.
        """
        if named := {folder: split for folder in folders if (split := split_of(folder))}:
            return named
        words = {folder: [word for word in words_of(folder) if word in SPLITS] for folder in folders}
        splits = {folder: SPLITS[found[0]] for folder, found in words.items() if len(found) == 1}
        return splits if len(set(splits.values())) == len(folders) > 1 else {}

    def _check(self, root: Path, named: dict[str, str], others: list[str]) -> None:
        if others:
            raise ValueError(
                f"{root} holds {listed(list(named))}, which are splits, beside {listed(others)}, which are not: call"
                f" every folder one of {', '.join(SPLITS)}, or move the others away"
            )
        for split, count in Counter(named.values()).items():
            if count > 1:
                same = listed([folder for folder in named if named[folder] == split])
                raise ValueError(f"{root} holds {same}, which are all called as the split {split!r}: keep one of them")

    def _check_below(self, root: Path, files: list[Path]) -> None:
        below = {folder: file for file in files for folder in file.parts[1:-1] if folder.lower() in SPLITS}
        if len({SPLITS[folder.lower()] for folder in below}) > 1:
            found = listed([str(Path(*file.parts[: file.parts.index(name) + 1])) for name, file in below.items()])
            raise ValueError(f"{root} holds splits inside other folders, {found}: put the folders of the splits first")

    def _splits_of_shards(self, root: Path, files: list[Path]) -> dict[str, tuple[Path, list[Path]]]:
        """The splits of shards that lie in one folder, by their names; all are `train` if no name says another."""
        parts: dict[str | None, list[Path]] = {}
        for file in files:
            words = {SPLITS[word] for word in words_of(file.stem) if word in SPLITS}
            numbered = NUMBERED.fullmatch(file.name)
            split = split_of(file.stem) or (words.pop() if len(words) == 1 else numbered and numbered[1])
            parts.setdefault(split, []).append(file)
        if None in parts and len(parts) > 1:
            named = listed([str(file) for split in parts if split is not None for file in parts[split]])
            raise ValueError(
                f"{root} holds {named}, which are named after splits, beside {listed(parts[None])}, which are not:"
                f" name every file after one of {', '.join(SPLITS)}, or move the others away"
            )
        order = {split: place for place, split in enumerate(("train", "validation", "test"))}
        in_order = sorted(parts, key=lambda name: order.get(name or "", 9))
        return {split or "train": (root, parts[split]) for split in in_order}

    @property
    def data_files(self) -> dict[str, list[str]]:
        """For each split the paths that `datasets` is to read; if there is metadata, only the paths of its files.

        Raises:
            ValueError: some splits have metadata and others have none.
        """
        kind, _ = self.contents
        found: dict[str, list[str]] = {}
        for split, (root, files) in self.splits.items():
            files = [file for file in files if kind != "metadata" or file.name in METADATA]
            if not files:
                raise ValueError(f"{root} has no metadata.csv, .jsonl or .parquet, which others of {self.path} have")
            found[split] = [str(Path(root, file).absolute()) for file in files]
        return found

    def class_folders(self, labelled: bool) -> datasets.DatasetDict:
        """The pictures, undecoded. The folders right below that of a split are the classes, whatever lies inside them.

        Args:
            labelled: whether a picture beside the folders of the classes is an error. If it is none, one such picture
                means that there are no classes and no labels.

        Raises:
            ValueError: there is such a picture, and labels are needed.
        """
        classes, loose = set(), []
        for root, files in self.splits.values():
            classes |= {file.parts[0] for file in files if len(file.parts) > 1}
            loose += [root / file for file in files if len(file.parts) == 1]
        if loose and classes and labelled:
            raise ValueError(
                f"{loose[0]} lies beside the folders of the classes {listed(sorted(classes))}, and in none"
            )
        names = [] if loose else sorted(classes)
        if names and labelled:
            self._check_folders(classes)
        numbers = {name: number for number, name in enumerate(names)}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        if names:
            features["label"] = datasets.ClassLabel(names=names)
        data = datasets.DatasetDict()
        for split, (root, files) in self.splits.items():
            rows: dict[str, list[Any]] = {"image": [{"bytes": None, "path": str(root / file)} for file in files]}
            if names:
                rows["label"] = [numbers[file.parts[0]] for file in files]
            data[split] = datasets.Dataset.from_dict(rows, features, split=datasets.NamedSplit(split))
        return data

    def _check_folders(self, classes: set[str]) -> None:
        """See that no folder beside those of the classes was meant to be one.

        Raises:
            ValueError: it holds pictures of kinds that Pillow does not open.
        """
        for root, _ in self.splits.values():
            above = os.path.realpath(self.path), os.path.realpath(root)
            for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name not in classes):
                if folder.name.startswith((".", "__")) or os.path.realpath(folder) in above:
                    continue
                files = [path for path, problem in files_below(folder, above) if problem is None]
                pictures = [file for file in files if file.suffix.lower() in UNREAD_PICTURES]
                if pictures:
                    raise ValueError(
                        f"{folder} lies among the folders of the classes, and of its {len(files)} files, such as"
                        f" {pictures[0].name}, none can be read: convert them, or move the folder away"
                    )
                logger.warning_once(f"{folder} holds no pictures, and is no class")


UNREAD_PICTURES = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
"""How names of pictures end that Pillow does not open by itself."""


class Circle(ValueError):
    """A link leads to a folder above it."""


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, Exception | None]]:
    """All files below a folder, except hidden ones, in the order of their names; links to folders are followed.

    What cannot be looked into is given with the reason: a folder that cannot be read, a name that is not UTF-8, a link
    that leads to itself or to a folder above.

    Args:
        above: real paths of the folders above.
    """
    real = os.path.realpath(folder)
    if real in above:
        yield folder, Circle(f"{folder} leads to a folder above it")
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield folder, error
        return
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        path = Path(entry.path)
        try:
            entry.name.encode()
            is_folder = entry.is_dir()
        except UnicodeEncodeError:
            yield path, ValueError(f"the name of {entry.path!a} is no UTF-8 text: rename it")
        except OSError as error:
            yield path, error
        else:
            yield from files_below(path, (*above, real)) if is_folder else [(path, None)]


def walk(folder: Path) -> Iterator[Path]:
    """As [`files_below`], but what cannot be looked into is an error; links that lead to a folder above are left out.

    Raises:
        ValueError: a name is not UTF-8.
        OSError: a folder cannot be read.
    """
    for path, problem in files_below(folder):
        if problem is None:
            yield path
        elif not isinstance(problem, Circle):
            raise problem


def kind_of(path: Path) -> str | None:
    """What a file is: `"metadata"`, `"pictures"`, the ending of a shard, or `None` for any other."""
    if path.name in METADATA:
        return "metadata"
    ending = path.suffix.lower()
    if ending in ImageFolder.EXTENSIONS or ending in (".avif", ".mpo"):  # which `datasets` does not know
        return "pictures"
    return ending if ending in SHARDS else None


def as_data_files(paths: list[str]) -> Any:
    """Paths for `datasets`, which takes strings for patterns. By the times of change it notices new content."""
    return DataFilesList(paths, [(str(os.path.getmtime(path)),) for path in paths])
