# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Loads pictures by `datasets`, with labels or without, from parquet files, tars, metadata or plain folders."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.info import DatasetInfosDict
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import metadata_load
from transformers.utils import logging

from ..failures import about, first_line
from ..messages import listed, printable
from .folders import Folder, as_data_files


logger = logging.get_logger(__name__)

IMAGE_COLUMNS = ("image", "images", "img", "pixel_values")
"""How a column of pictures is called where there are other pictures too, such as masks."""
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_name", "category", "target")


def number_or_text(content: bytes) -> int | str | None:
    """The label in a member of a tar: a number if it has only digits, else text; `None` if it is empty."""
    text = content.decode().strip()
    return int(text) if text.isascii() and text.isdigit() else text or None


WebDataset.DECODERS["cls"] = number_or_text  # `datasets` itself takes numbers alone


def load_labelled_images(
    source: str,
    name: str | None = None,
    splits: list[str] | None = None,
    names: list[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> datasets.DatasetDict:
    """Load a data set by Hub name or local folder: parquet files, WebDataset tars, pictures with metadata, or a folder
    of pictures for each class, whatever lies below it.

    Args:
        source: as `datasets.load_dataset` takes it; a local folder is read as [`Folder`] says.
        name: its configuration, where it has several.
        splits: read the files of these alone; default: all.
        names: of the classes, where the data set does not have them; default for labels that are text: all that occur,
            sorted.
        image_column, label_column: names of columns; see [`find_columns`].

    Returns:
        Its splits, with the pictures in a column `image` that is not decoded yet and the labels in a column `label`.

    Raises:
        ValueError: columns or names of classes are missing, or there are several; the message lists them. Or a label is
            none of the names.
    """
    data = load_any(source, name, splits, labelled=True)
    columns = find_columns(next(iter(data.values())).features, source, image_column, label_column)
    data = data.select_columns(list(columns))
    data = data.rename_columns({column: role for column, role in columns.items() if column != role})
    label = next(iter(data.values())).features["label"]
    if is_text(label):
        data = _number_text(data, names, source)
    elif not isinstance(label, datasets.ClassLabel):
        if names is None:
            raise ValueError(f"the labels of {source} are numbers without names: give the names by --class_names")
        numbers = {number for split in data.values() for number in split.unique("label") if number is not None}
        if (highest := max(numbers, default=0)) >= len(names):
            raise ValueError(f"{source} has the label {highest}, but {len(names)} classes have names, counted from 0")
        data = data.cast_column("label", datasets.ClassLabel(names=names))
    elif names is not None:
        refuse_other_names(names, label.names, source)
    return data.cast_column("image", datasets.Image(decode=False))


def load_images(
    source: str, name: str | None = None, splits: list[str] | None = None, image_column: str | None = None
) -> datasets.DatasetDict:
    """As [`load_labelled_images`], but with the column `image` alone, whether there are labels or not.

    A folder may hold images anywhere.

    Raises:
        ValueError: there is no column of images, or there are several; the message lists the columns.
    """
    data = load_any(source, name, splits)
    image = find_image(next(iter(data.values())).features, source, image_column)
    data = data.select_columns([image])
    if image != "image":
        data = data.rename_column(image, "image")
    return data.cast_column("image", datasets.Image(decode=False))


def find_data_files(source: str, name: str | None = None) -> dict[str, list[str]]:
    """Paths or URLs of the files of each split.

    Raises:
        ValueError: a local folder whose splits cannot be told apart; the message lists what was found.
    """
    if folder := local_folder(source, name):
        return folder.data_files
    with about(source):
        data_files = datasets.load_dataset_builder(named(source), name).config.data_files or {}
    return {split: list(map(str, files)) for split, files in data_files.items()}


def load_features(source: str, name: str | None, split: str) -> datasets.Features:
    """The columns of a data set; only the beginning of its files is read."""
    folder = local_folder(source, name)
    files = {} if folder is None else {"data_files": {split: as_data_files(folder.data_files[split])}}
    return datasets.load_dataset(named(source), name, split=split, streaming=True, **files).features


def named(source: str) -> str:
    """A local folder by its whole path, for `datasets`, which calls data by the last name of a path: `.` has none."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def local_folder(source: str, name: str | None = None) -> Folder | None:
    """The local folder that a data set is, to be read as [`Folder`] says.

    Returns:
        `None` for a name on the Hub, and for a folder that `datasets` must read itself: one whose card names its files,
        or of which a configuration was asked for.

    Raises:
        ValueError: a path is no folder.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
            raise ValueError(f"there is no folder {source} to read pictures from")
        return None
    card = path / "README.md"
    has_files = card.is_file() and "data_files" in str((metadata_load(card) or {}).get("configs"))
    return None if name is not None or has_files else Folder(path)


def load_any(
    source: str, name: str | None = None, splits: list[str] | None = None, labelled: bool = False
) -> datasets.DatasetDict:
    """Load a data set with whatever columns it has; see [`load_labelled_images`].

    Args:
        labelled: whether a picture beside the folders of the classes is an error.
    """
    folder = local_folder(source, name)
    with about(source):
        if folder is None:
            return _load_with_datasets(source, name, splits)
        return _load_folder(folder, source, splits, labelled)


def _load_folder(folder: Folder, source: str, splits: list[str] | None, labelled: bool) -> datasets.DatasetDict:
    kind, _ = folder.contents
    data_files = folder.data_files
    wanted = [pick_split(data_files, split) for split in splits or data_files]
    if kind == "pictures":
        data = folder.class_folders(labelled)
        return datasets.DatasetDict({split: data[split] for split in wanted})
    patterns = {split: as_data_files(files) for split, files in data_files.items()}
    if kind == "metadata":  # all of it is read: a part could lack columns
        try:
            data = datasets.load_dataset("imagefolder", data_files=patterns)
        except IndexError as error:  # of tables that have a header alone
            raise ValueError(f"the metadata of {source} have no rows") from error
        except Exception as error:  # which does not say which file is meant
            tables = [Path(file) for files in data_files.values() for file in files]
            problems = [f"{table} {problem}" for table in tables if (problem := problem_of(table))]
            raise ValueError("; ".join(problems) or f"{listed(tables)}: {first_line(error)}") from error
        return datasets.DatasetDict({split: data[split] for split in wanted})
    described = DatasetInfosDict.from_directory(source)  # by the folder's card
    features = next(iter(described.values())).features if len(described) == 1 else None
    patterns = {split: patterns[split] for split in wanted}
    return datasets.load_dataset(named(source), data_files=patterns, features=features)


def problem_of(table: Path) -> str | None:
    """Why `datasets` cannot read a table of pictures, if that can be seen in its first line that is not empty."""
    if table.suffix == ".parquet":
        return None
    try:
        first = next((line for line in table.read_text(encoding="utf-8-sig").splitlines() if line.strip()), "")
        columns = next(csv.reader([first]), []) if table.suffix == ".csv" else json.loads(first)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error}); save it as UTF-8"
    except (json.JSONDecodeError, csv.Error) as error:
        return f"has a first line that cannot be read ({error})"
    if table.suffix == ".jsonl" and not isinstance(columns, dict):
        return (
            f'must have a line such as {{"file_name": "1.png"}} for each picture; its first line is {printable(first)}'
        )
    if not any(re.fullmatch(r"(.*_)?file_names?", column) for column in columns):
        between = "; they are separated by commas" if table.suffix == ".csv" and len(columns) < 2 else ""
        return f"has the columns {listed(columns) or 'none'}, and none called file_name{between}"
    return None


def _load_with_datasets(source: str, name: str | None, splits: list[str] | None) -> datasets.DatasetDict:
    only = {}
    if splits is not None:
        builder = datasets.load_dataset_builder(named(source), name)
        only["data_files"] = {split: list(builder.config.data_files[split]) for split in splits}
        only["features"] = builder.info.features
    return datasets.load_dataset(named(source), name, **only)


def is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _number_text(data: datasets.DatasetDict, names: list[str] | None, source: str) -> datasets.DatasetDict:
    """Turn labels that are text into numbers of classes."""
    texts = {split: part["label"][:] for split, part in data.items()}
    found = sorted({text for column in texts.values() for text in column if text is not None})
    names = found if names is None else names
    if unknown := [text for text in found if text not in set(names)]:
        raise ValueError(f"{source} has the labels {listed(unknown)}, which are none of the {len(names)} classes given")
    numbers, feature = {text: number for number, text in enumerate(names)}, datasets.ClassLabel(names=names)
    return datasets.DatasetDict(
        {
            split: part.remove_columns("label").add_column(
                "label", list(map(numbers.get, texts[split])), feature=feature
            )
            for split, part in data.items()
        }
    )


def find_image(features: datasets.Features, source: str, name: str | None = None) -> str:
    """The column of pictures of this name, or the only one.

    Raises:
        ValueError: there is none, or there are several and no name is given.
    """
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    return choose_image_column(images, source, features, name)


def choose_image_column(found: list[str], source: str, columns: Mapping[str, Any], name: str | None = None) -> str:
    """[`choose_column`] of those that hold pictures."""
    return choose_column(found, name, "images", "--image_column_name", source, columns)


def choose_column(
    found: list[str],
    name: str | None,
    what: str,
    option: str,
    source: str,
    columns: Mapping[str, Any],
    hint: str = "",
) -> str:
    """Of the columns that were found to hold something the one of this name, or the only one.

    Args:
        found: their names.
        name: that is wanted, if one was given.
        what, option, source: what they hold, the argument that gives the name, and the data, for messages.
        columns: all that there are, with their types.
        hint: what the message adds where none was found.

    Raises:
        ValueError: there is none, or there are several and no name is given; the message lists all columns with their
            types.
    """
    if name in found or (name is None and len(found) == 1):
        return name or found[0]
    if name is not None:
        raise ValueError(f"{source} has no {what} in a column {name!r}; it has {found or 'none'} in {dict(columns)}")
    if found:
        raise ValueError(f"{source} has several columns of {what}, {found}: name one of them by {option}")
    raise ValueError(f"{source} must have a column of {what}, got {dict(columns)}{hint}")


def find_columns(
    features: datasets.Features, source: str, image: str | None = None, label: str | None = None
) -> dict[str, str]:
    """Which column is the `image`, and which the `label`: those of the given names, or else the only ones.

    Images are in a column of pictures. Labels are in a column of class labels; if there is none, in one of whole
    numbers or text whose name is given or in `LABEL_COLUMNS`.

    Returns:
        `"image"` and `"label"` by the names of the columns.

    Raises:
        ValueError: there is not one of each.
    """
    found = find_image(features, source, image)
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels or label is not None:
        known = [column for column in (label, *LABEL_COLUMNS) if column in features and column not in labels]
        labels += [c for c in known if is_text(features[c]) or "int" in getattr(features[c], "dtype", "")]
    hint = "; --label_column_name names a column of numbers or text"
    chosen = choose_column(labels, label, "labels", "--label_column_name", source, features, hint)
    return {found: "image", chosen: "label"}


EVALUATION_SPLITS = ("validation", "test")
"""What is evaluated by default: the first of these that there is."""


def pick_split(available: Iterable[str], *names: str) -> str:
    """The first of these splits that there is.

    Raises:
        ValueError: none is; the message lists those there are.
    """
    for name in names:
        if name in available:
            return name
    found = ", ".join(repr(str(name)) for name in available)
    raise ValueError(f"there is no split {' or '.join(map(repr, names))}; there are {found}")


def refuse_other_names(given: list[str], own: list[str] | None, source: str) -> None:
    """See that names which are given for the classes are those that the data have, if these have any.

    Raises:
        ValueError: they are not.
    """
    if own is not None and given != own:
        raise ValueError(f"{source} names its classes itself, {listed(own)}: leave --class_names out")


def class_names(splits: datasets.DatasetDict) -> dict[int, str]:
    """Class names by label, for `id2label`."""
    return dict(enumerate(next(iter(splits.values())).features["label"].names))


def hold_out(split: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold a part of the training pictures out for evaluation: at least one of every class that has two or more.

    Args:
        share: of the pictures to hold out, the command's `--eval_share`.

    Returns:
        The pictures that stay for training, and those that are held out.

    Raises:
        ValueError: no class has two pictures, or the share is not above 0 and below 1.
    """
    counts = _count_classes(split)
    if not any(count > 1 for count in counts.values()):
        raise ValueError(
            f"--eval_share holds out a picture of every class that has two, but none has: {listed(list(counts))}; add"
            " pictures, or name a split by --eval_split"
        )
    if single := [name for name, count in counts.items() if count == 1]:
        logger.warning("a single picture, which stays in training: %s", listed(single))
    held_out, rest = draw_by_class(split, share, seed, "--eval_share", leave=1)
    return rest, held_out


def draw_by_class(
    split: datasets.Dataset, share: float, seed: int, argument: str, leave: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw a share of every class.

    Args:
        split: with a column `label`, or else of one class.
        share: above 0 and below 1; at least one picture of every class is drawn.
        seed: of the draw.
        argument: name of the command's argument for the share, for messages.
        leave: how many pictures of every class must be left; none is drawn of a class that has no more than these.

    Returns:
        The pictures that were drawn, and the others.

    Raises:
        ValueError: the share is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"{argument} must be above 0 and below 1, got {share}")
    labels = _labels(split)
    order = np.random.default_rng(seed).permutation(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    quotas = share * counts
    drawn = np.floor(quotas).astype(int)
    most_owed = np.argsort(drawn - quotas, kind="stable")[: round(share * len(labels)) - drawn.sum()]
    drawn[most_owed] += 1
    drawn = np.minimum(np.maximum(drawn, 1), counts - leave)
    is_drawn = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, drawn):
        is_drawn[order[labels[order] == label][:count]] = True
    return split.select(np.flatnonzero(is_drawn)), split.select(np.flatnonzero(~is_drawn))


def _labels(split: datasets.Dataset) -> np.ndarray:
    if "label" not in split.features:
        return np.zeros(len(split), dtype=int)
    return np.array([-1 if label is None else label for label in split["label"][:]], dtype=int)


def _count_classes(split: datasets.Dataset) -> dict[str, int]:
    """How many pictures each class has; a class without any is left out."""
    classes, counts = np.unique(_labels(split), return_counts=True)
    names = split.features["label"].names if "label" in split.features else ["pictures"]
    known, counted = dict(enumerate(names)), zip(classes.tolist(), counts.tolist())
    return {known.get(label, "no class"): count for label, count in counted}
