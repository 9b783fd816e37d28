# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures with masks through `datasets`, checked as they are read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ...class_names import read_class_names
from ...data.pictures import decode_image, unturned
from ...data.samples import PictureDataset, evenly_spread, seeded
from ...data.sources import IMAGE_COLUMNS, choose_column, load_any


logger = logging.get_logger(__name__)


IGNORED_CLASS = 255
"""Value of a mask at pixels of no class, which neither the loss nor the metrics count."""
MASK_COLUMNS = ("mask", "annotation", "label", "labels", "segmentation", "segmentation_mask", "semantic_mask")


def load_masked_images(
    source: str, name: str | None = None, image_column: str | None = None, mask_column: str | None = None
) -> datasets.DatasetDict:
    """Load pictures and masks by Hub name or from a local folder.

    A folder holds parquet files, or pictures with a `metadata.jsonl` that has `file_name` and `mask_file_name`.

    Args:
        source: Hub name or folder.
        name: configuration of a data set on the Hub that has several.
        image_column, mask_column: names of the columns; default: the ones that are called as is usual.

    Returns:
        Its splits, with the undecoded columns `image` and `mask`, and `objects` if it has boxes.

    Raises:
        ValueError: there is not one column of pictures and one of masks; the message lists the columns.
    """
    data = load_any(source, name)
    columns = find_mask_columns(next(iter(data.values())).features, source, image_column, mask_column)
    if "objects" in data[next(iter(data))].features:
        columns["objects"] = "objects"
    data = data.select_columns(list(columns))
    data = data.rename_columns({column: role for column, role in columns.items() if column != role})
    for role in ("image", "mask"):
        data = data.cast_column(role, datasets.Image(decode=False))
    return data


def find_mask_columns(
    features: datasets.Features, source: str, image: str | None = None, mask: str | None = None
) -> dict[str, str]:
    """The names of the two columns of pictures, each with its role, `image` or `mask`.

    Raises:
        ValueError: a role has no column, or several.
    """
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found: dict[str, str] = {}
    for role, name, usual in (("image", image, IMAGE_COLUMNS), ("mask", mask, MASK_COLUMNS)):
        free = [column for column in pictures if column not in found]
        candidates = free if name else [column for column in free if column in usual and column != mask]
        hint = f"; one of pictures that is called {', '.join(usual)}, or named by --{role}_column_name"
        found[choose_column(candidates, name, f"{role}s", f"--{role}_column_name", source, features, hint)] = role
    return found


def mask_class_names(
    data: datasets.DatasetDict, file: Path | None = None, default: dict[int, str] | None = None
) -> dict[int, str]:
    """Names of the classes by their value in a mask: the lines of a file, else the categories of the data's `objects`.

    Args:
        default: for data that have no categories.

    Raises:
        ValueError: there are none of these, or a line of the file is empty or a repetition.
    """
    if file is not None:
        return dict(enumerate(read_class_names(file)))
    objects = next(iter(data.values())).features.get("objects")
    category = objects.get("category") if hasattr(objects, "get") else None
    names = getattr(getattr(category, "feature", None), "names", None)
    if names is None and default is not None:
        return default
    if names is None:
        raise ValueError("masks are numbers without names: give a file with the name of a class on each line")
    return dict(enumerate(names))


def read_mask(
    image: dict[str, Any] | None,
    name: str,
    num_labels: int,
    reduce_labels: bool = False,
    ignored_class: int | None = None,
) -> np.ndarray:
    """A mask `(height, width)` in uint8 with a class at each pixel, or 255 for none.

    Args:
        image: undecoded picture of one channel. If it has a palette, the indices are the classes.
        name: of the row, for messages.
        num_labels: number of classes.
        reduce_labels: whether 0 means "none of the classes", as in ADE20K, and the first class is 1.
        ignored_class: a class that counts as none, numbered as the others are.

    Raises:
        ValueError: the mask is missing or damaged, has several channels, or has a value that is no class.
    """
    mask = decode_image(image, f"the mask of {name}", _single_channel)
    if reduce_labels:
        mask = np.where((mask == 0) | (mask == IGNORED_CLASS), IGNORED_CLASS, mask - 1)
    if ignored_class is not None:
        mask = np.where(mask == ignored_class, IGNORED_CLASS, mask)
    wrong = mask[(mask != IGNORED_CLASS) & (mask >= num_labels)]
    if wrong.size:
        raise ValueError(
            f"the mask of {name} has the value {wrong.max()}, and {wrong.size} pixels in all that are no class: there"
            f" are {num_labels} classes, counted from 0, and {IGNORED_CLASS} for what is ignored"
        )
    return mask.astype(np.uint8)


def _single_channel(picture: PIL.Image.Image) -> np.ndarray:
    if len(picture.getbands()) != 1:
        raise ValueError(f"a mask has one channel, a class at each pixel; this one is {picture.mode}")
    return np.array(picture).astype(np.int64)


class SegmentationDataset(PictureDataset, Dataset[dict[str, Any]]):
    """One split as `{"pixel_values", "labels", "names"}` for the Trainer; `labels` is the mask `(height, width)`.

    Args:
        split: as [`load_masked_images`] gives it.
        transform: of an RGB picture and its mask, uint8 `(height, width)`; none if rows are only read.
        num_labels, reduce_labels, ignored_class: as in [`read_mask`].
        classes: `(num_labels,)`, the number that a model has for each class of the masks; default: the same.
        seed: see [`PictureDataset`].

    Raises:
        ValueError: there are more than 255 classes, or the ignored one cannot be one. On reading a row: as
            [`read_mask`], the picture is damaged or its EXIF data turn it, or picture and mask differ in size.
    """

    num_labels: int

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[[PIL.Image.Image, np.ndarray], tuple[torch.Tensor, torch.Tensor]] | None,
        num_labels: int,
        reduce_labels: bool = False,
        seed: int | None = None,
        ignored_class: int | None = None,
        classes: np.ndarray | None = None,
    ):
        super().__init__(transform, seed=seed, num_labels=num_labels)
        if num_labels > IGNORED_CLASS:
            raise ValueError(f"there can be {IGNORED_CLASS} classes at most, got {num_labels}")
        if classes is not None and classes.max() >= IGNORED_CLASS:
            raise ValueError(f"a model can have {IGNORED_CLASS} classes at most here, got {classes.max() + 1}")
        if ignored_class is not None and not 0 <= ignored_class < IGNORED_CLASS:  # it may have no name
            raise ValueError(f"the ignored class must be from 0 to {IGNORED_CLASS - 1}, got {ignored_class}")
        self.split = split
        self.reduce_labels = reduce_labels
        self.ignored_class = ignored_class
        self._number = np.arange(IGNORED_CLASS + 1, dtype=np.uint8)
        self._number[:num_labels] = np.arange(num_labels) if classes is None else classes

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> tuple[PIL.Image.Image, np.ndarray, str]:
        """A row's picture, its mask, and its name for messages."""
        picture, mask, name = self._read(index)
        return picture, self._number[mask], name

    def _read(self, index: int) -> tuple[PIL.Image.Image, np.ndarray, str]:
        """The same, with the numbers that the data give to the classes."""
        row = self.split[index]
        name = (row["image"] or {}).get("path") or f"row {index}"
        picture = decode_image(row["image"], name, unturned)
        mask = read_mask(row["mask"], name, self.num_labels, self.reduce_labels, self.ignored_class)
        if picture.size != mask.shape[::-1]:
            raise ValueError(
                f"{name} has {picture.size[0]}×{picture.size[1]} pixels, but its mask {mask.shape[1]}×{mask.shape[0]}"
            )
        return picture, mask, name

    def check(self, rows: int = 32) -> None:
        """Read some rows, evenly spread over the split, so that wrong data are found before training begins.

        Raises:
            ValueError: there is none, one is wrong, or of two classes the second is nowhere, where 255 may be meant.
        """
        if not len(self):
            raise ValueError("the split has no rows")
        read = evenly_spread(len(self), rows)
        values = {int(value) for index in read for value in np.unique(self._read(index)[1])}
        if values == {IGNORED_CLASS}:
            logger.warning("no class in %d masks of %d: all their pixels are ignored", len(read), len(self))
        is_as_stored = not self.reduce_labels and self.ignored_class is None
        if values == {0, IGNORED_CLASS} and self.num_labels == 2 and is_as_stored:
            others = (self._read(index)[1] for index in range(len(self)))
            if not any((mask == 1).any() for mask in others):
                raise ValueError(
                    f"the masks have the values 0 and {IGNORED_CLASS} alone, and {IGNORED_CLASS} is ignored: write 1"
                    " for the second class"
                )

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, mask, name = self.read(index)
        with seeded(self.seed, self.epoch, index):
            pixel_values, labels = self.transform(picture, mask)
        return {"pixel_values": pixel_values, "labels": labels, "names": name}


def collate_masks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `pixel_values` `(B, 3, H, W)`, `labels` `(B, height, width)`.

    Raises:
        ValueError: the pictures or masks differ in size, as in most evaluations.
    """
    for key in ("pixel_values", "labels"):
        sizes = sorted({tuple(sample[key].shape[-2:]) for sample in samples})
        if len(sizes) > 1:
            raise ValueError(f"a batch has pictures or masks of one size, got {sizes}: evaluate one picture at a time")
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "names": [sample["names"] for sample in samples],
    }
