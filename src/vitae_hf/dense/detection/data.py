# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures with boxes and masks of objects through `datasets`, checked before training."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ...class_names import read_class_names
from ...data.pictures import decode_image, unturned
from ...data.samples import PictureDataset, evenly_spread, seeded
from ...data.sources import (
    IMAGE_COLUMNS,
    choose_column,
    choose_image_column,
    is_text,
    load_any,
    refuse_other_names,
)
from ...messages import listed
from .coco import find_annotations, load_coco
from .objects import BOX_KEYS, CLASS_KEYS, Objects, columns_of, from_corners, read_objects


logger = logging.get_logger(__name__)

OBJECT_COLUMNS = ("objects", "annotations", "object")
SIZE_DIVISOR = 32
"""Both sides of a padded batch are multiples of this, as mmdetection has it."""


def load_boxed_images(
    source: str,
    name: str | None = None,
    file: Path | None = None,
    image_column: str | None = None,
    objects_column: str | None = None,
) -> tuple[datasets.DatasetDict, dict[int, str]]:
    """Load pictures and their objects by Hub name or from a local folder.

    A folder holds COCO's JSON files and their pictures, parquet files, or pictures with a `metadata.jsonl` that has
    `file_name` and `objects`, of which each has a list `bbox` of boxes and a list `category` of classes.

    Args:
        source: Hub name or folder.
        name: configuration of a data set on the Hub that has several.
        file: with a class on each line, for data that do not name theirs.
        image_column, objects_column: names of the columns; default: the only one of each, called as is usual.

    Returns:
        Its splits, with the undecoded column `image` and the column `objects`; and the names of the classes.

    Raises:
        ValueError: there is not one column of pictures and one of objects, or the classes have no names.
    """
    names = None if file is None else read_class_names(file)
    annotations = find_annotations(Path(source)) if name is None and Path(source).is_dir() else {}
    data = load_coco(Path(source), annotations) if annotations else load_any(source, name)
    image, objects = find_object_columns(next(iter(data.values())).features, source, image_column, objects_column)
    data = data.select_columns([image, objects]).rename_columns(
        {column: role for column, role in ((image, "image"), (objects, "objects")) if column != role}
    )
    data = data.cast_column("image", datasets.Image(decode=False))
    return data, dict(enumerate(find_class_names(data, source, names)))


def find_object_columns(
    features: datasets.Features, source: str, image: str | None = None, objects: str | None = None
) -> tuple[str, str]:
    """The column of pictures and the column of objects.

    Raises:
        ValueError: there is not one of each; the message lists the columns.
    """
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if image is None:
        pictures = [column for column in pictures if column in IMAGE_COLUMNS] or pictures
    known = OBJECT_COLUMNS if objects is None else (objects,)
    boxed = [column for column in known if _key(features.get(column), BOX_KEYS)]
    boxed = [column for column in boxed if _key(features[column], CLASS_KEYS)]
    hint = (
        f"; one that is called {', '.join(OBJECT_COLUMNS)}, or named by --objects_column_name, in which each picture"
        " has a list `bbox` and a list `category`, or COCO's JSON files"
    )
    return (
        choose_image_column(pictures, source, features, image),
        choose_column(boxed, objects, "objects", "--objects_column_name", source, features, hint),
    )


def _fields(feature: Any) -> dict[str, Any]:
    """The fields of a column of objects, each of which is a list for a picture, or a part of each object."""
    inner = getattr(feature, "feature", feature)
    return dict(inner) if isinstance(inner, dict) else {}


def _key(feature: Any, known: tuple[str, ...]) -> str | None:
    return next((key for key in known if key in _fields(feature)), None)


def has_segmentations(split: datasets.Dataset) -> bool:
    """Whether any object has a mask."""
    rows = split.select_columns("objects")["objects"]
    return any(any(columns_of(row).get("segmentation") or ()) for row in rows)


def find_class_names(data: datasets.DatasetDict, source: str, names: list[str] | None) -> list[str]:
    """The names of the classes: those given, those of the data, or the texts that stand for classes, sorted.

    Raises:
        ValueError: classes are numbers, and nothing names them; or the data name them otherwise than was given.
    """
    feature = next(iter(data.values())).features["objects"]
    category = _fields(feature)[str(_key(feature, CLASS_KEYS))]
    category = getattr(category, "feature", category)
    own = list(category.names) if isinstance(category, datasets.ClassLabel) else None
    if names is not None:
        refuse_other_names(names, own, source)
        return names
    if own is not None:
        return own
    if not is_text(category):
        raise ValueError(f"the classes of {source} are numbers without names: give the names by --class_names")
    rows = (row for split in data.values() for row in split.select_columns("objects"))
    return sorted({text for row in rows for text in columns_of(row["objects"]).get("category", []) if text is not None})


class DetectionDataset(PictureDataset, Dataset[dict[str, Any]]):
    """One split as `{"pixel_values", "labels", "rows", "names"}` for the Trainer.

    `labels` of a picture are its `class_labels` `(N,)`, its `boxes` `(N, 4)` as left, top, right and bottom in pixels
    of `pixel_values`, and its `masks` `(N, height, width)`, if there are any.

    Args:
        split: as [`load_boxed_images`] gives it.
        transform: of an RGB picture and its [`Objects`], to pixels and labels; none if rows are only read.
        names: of the classes.
        with_masks: whether every object needs a mask.
        on_bad_object: whether an object that something is wrong with is an error that names it, or left out.
        box_format: what the numbers of a box are: left, top, width and height, or left, top, right and bottom.
        seed: see [`PictureDataset`].
        classes: the number that a model has for each class of the data; default: the same.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[[PIL.Image.Image, Objects], tuple[torch.Tensor, dict[str, torch.Tensor]]] | None,
        names: dict[int, str],
        with_masks: bool = False,
        on_bad_object: Literal["error", "skip"] = "error",
        box_format: Literal["xywh", "xyxy"] = "xywh",
        seed: int | None = None,
        classes: np.ndarray | None = None,
    ):
        super().__init__(transform, seed=seed, num_labels=len(names))
        self.split = split
        self.classes = classes
        self.numbers = {name: number for number, name in names.items()}
        self.with_masks = with_masks
        self.on_bad_object = on_bad_object
        self.box_format = box_format

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def objects(self, index: int) -> tuple[Objects, list[str]]:
        """The objects of a row, and what is wrong with those that are left out, with the name of the picture.

        Raises:
            ValueError: the picture is missing or damaged.
        """
        return self._objects(self.split[index], index)

    def _objects(
        self, row: dict[str, Any], index: int, size: tuple[int, int] | None = None
    ) -> tuple[Objects, list[str]]:
        name = self._name(row, index)
        height, width = size or decode_image(row["image"], name, lambda picture: picture.size[::-1])
        columns = columns_of(row["objects"])
        if "category" in columns:  # text stands for a class by its name
            columns["category"] = [self.numbers.get(c, c) if isinstance(c, str) else c for c in columns["category"]]
        if self.box_format == "xyxy" and "bbox" in columns:
            columns["bbox"] = [from_corners(box) for box in columns["bbox"]]
        objects, problems = read_objects(columns, len(self.numbers), height, width, self.with_masks)
        if self.classes is not None:
            objects.labels = self.classes[objects.labels]
        return objects, [f"{name}: {problem}" for problem in problems]

    @staticmethod
    def _name(row: dict[str, Any], index: int) -> str:
        """The name of a row for messages: the file of its picture, if it has one."""
        return (row["image"] or {}).get("path") or f"row {index}"

    def read(self, index: int) -> tuple[PIL.Image.Image, Objects, str]:
        """A row's picture, its objects, and its name for messages.

        Raises:
            ValueError: the picture cannot be read or is stored turned, or, unless they are skipped, an object is bad.
        """
        row = self.split[index]
        name = self._name(row, index)
        picture = decode_image(row["image"], name, unturned)
        objects, problems = self._objects(row, index, picture.size[::-1])
        if problems and self.on_bad_object == "error":
            raise ValueError(listed(problems, "; "))
        return picture, objects, name

    def check(self, first: int = 0, step: int = 1, decoded: int = 32) -> None:
        """Look at the objects of every row, and decode some pictures, before training begins.

        Args:
            first, step: which rows: from the first, every `step`-th.
            decoded: how many pictures to decode, evenly spread.

        Raises:
            ValueError: the split is empty, a picture cannot be read, or, unless they are skipped, objects are bad: the
                message names the first of them and counts the others.
        """
        if not len(self):
            raise ValueError("the split has no rows")
        problems: list[str] = []
        objects = 0
        for index in range(first, len(self), step):
            found, wrong = self.objects(index)
            objects, problems = objects + len(found), problems + wrong
        if problems and self.on_bad_object == "error":
            ways = "--on_bad_object skip leaves such objects out"
            if self.box_format == "xywh" and any("outside the picture" in problem for problem in problems):
                ways += ", --box_format xyxy reads boxes as left, top, right and bottom"
            raise ValueError(f"{listed(problems, '; ')}; {ways}")
        if problems:
            logger.warning("%d objects are left out: %s", len(problems), listed(problems, "; "))
        if not objects and step == 1:
            raise ValueError(f"none of the {len(self)} pictures has an object")
        for index in evenly_spread(len(self), decoded):
            self.read(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, objects, name = self.read(index)
        with seeded(self.seed, self.epoch, index):
            pixel_values, labels = self.transform(picture, objects.single())
        return {"pixel_values": pixel_values, "labels": labels, "rows": index, "names": name}


def collate_objects(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `pixel_values` `(B, 3, H, W)`, filled up with zeros on the right and below where pictures differ in
    size, `pixel_mask` `(B, H, W)`, 1 where the picture is, and lists `labels`, `rows` and `names`.
    """
    sizes = torch.tensor([sample["pixel_values"].shape[-2:] for sample in samples])
    height, width = sizes.amax(0).tolist()
    if (sizes != sizes[0]).any():
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in (height, width))
    pixel_values = torch.zeros(len(samples), 3, height, width)
    pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    for number, (sample, (rows, columns)) in enumerate(zip(samples, sizes.tolist())):
        pixel_values[number, :, :rows, :columns] = sample["pixel_values"]
        pixel_mask[number, :rows, :columns] = 1
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        **{key: [sample[key] for sample in samples] for key in ("labels", "rows", "names")},
    }
