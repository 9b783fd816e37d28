# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The objects that a picture is annotated with: boxes, classes and masks, and what can be wrong with them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks


BOX_KEYS = ("bbox", "bboxes", "box", "boxes")
CLASS_KEYS = ("category", "categories", "category_id", "label", "labels", "class")
MASK_KEYS = ("segmentation", "segmentations")
OTHER_KEYS = ("iscrowd", "area")
ROUNDING = 1.0
"""How many pixels a box may reach beyond its picture, where somebody rounded; it is clipped."""


@dataclass
class Objects:
    """The objects of one picture.

    Attributes:
        boxes: `(N, 4)` left, top, right and bottom in pixels, float32.
        labels: `(N,)` classes.
        is_crowd: `(N,)` whether a box holds many objects; such boxes are no targets, and evaluations ignore them.
        areas: `(N,)` in pixels: as annotated, else of the masks, else of the boxes.
        masks: COCO's compressed run-length codes, or `None` if the data have none or nobody asked for them.
    """

    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    masks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def single(self) -> "Objects":
        """Those that are no crowds."""
        kept = np.flatnonzero(~self.is_crowd)
        masks = None if self.masks is None else [self.masks[index] for index in kept]
        return Objects(self.boxes[kept], self.labels[kept], self.is_crowd[kept], self.areas[kept], masks)

    def pixels(self, height: int, width: int) -> np.ndarray:
        """The masks decoded: `(N, height, width)` of 0 and 1, uint8."""
        if not self.masks:
            return np.zeros((0, height, width), np.uint8)
        return np.ascontiguousarray(coco_masks.decode(self.masks).transpose(2, 0, 1))


def columns_of(objects: Any) -> dict[str, list[Any]]:
    """The annotations of a picture as lists under COCO's names: `bbox`, `category`, and those there are of
    `segmentation`, `iscrowd` and `area`.

    Args:
        objects: a list of dicts or a dict of lists, under these names or those that others use for them; or `None`.
    """
    if isinstance(objects, (list, tuple)):
        keys = dict.fromkeys(key for one in objects for key in one)
        objects = {key: [one.get(key) for one in objects] for key in keys}
    objects = objects or {}
    found = {}
    for role, known in (("bbox", BOX_KEYS), ("category", CLASS_KEYS), ("segmentation", MASK_KEYS)):
        values = next((objects[key] for key in known if objects.get(key) is not None), None)
        if values is not None:
            found[role] = list(values)
    return found | {key: list(objects[key]) for key in OTHER_KEYS if objects.get(key) is not None}


def read_objects(
    objects: Any, num_labels: int, height: int, width: int, with_masks: bool = False
) -> tuple[Objects, list[str]]:
    """The objects of a picture, without those that something is wrong with.

    Args:
        objects: as [`columns_of`] takes them, boxes as COCO has them: left, top, width and height in pixels.
        num_labels: number of classes.
        height, width: of the picture.
        with_masks: whether every object must have a mask.

    Returns:
        The objects, and what is wrong with the others, a few words each.
    """
    columns = columns_of(objects)
    boxes, labels = columns.get("bbox", []), columns.get("category", [])
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1 or len(boxes) != len(labels):
        said = ", ".join(f"{lengths.get(key, 0)} {key}" for key in dict.fromkeys(["bbox", "category", *lengths]))
        nothing, _ = read_objects(None, num_labels, height, width, with_masks)
        return nothing, [f"its objects differ in number: {said}"]
    unknown: list[Any] = [None] * len(boxes)
    crowds = columns.get("iscrowd", [0] * len(boxes))
    masks: dict[int, Any] = {}  # of the good objects
    problems = []
    for index, (box, label, crowd) in enumerate(zip(boxes, labels, crowds)):
        try:
            check_box(box, height, width)
            check_class(label, crowd, num_labels)
            segmentation = columns.get("segmentation", unknown)[index]
            masks[index] = as_mask(segmentation, height, width) if with_masks else None
        except ValueError as error:
            problems.append(f"object {index} {error}")
    kept = list(masks)
    corners = np.array([boxes[index] for index in kept], np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.array([width, height, width, height], np.float32))
    computed = (
        coco_masks.area(list(masks.values())) if masks and with_masks else (corners[:, 2:] - corners[:, :2]).prod(1)
    )
    annotated = [columns.get("area", unknown)[index] for index in kept]
    found = Objects(
        corners,
        np.array([labels[index] for index in kept], np.int64),
        np.array([crowds[index] for index in kept], bool),
        np.array([own if area is None else area for area, own in zip(annotated, computed)], np.float32),
        list(masks.values()) if with_masks else None,
    )
    return found, problems


def is_box(box: Any) -> bool:
    """Whether something is four numbers."""
    return isinstance(box, Sequence) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)


def from_corners(box: Any) -> Any:
    """Left, top, width and height of a box of left, top, right and bottom; what is no box is left as it is."""
    if not is_box(box):
        return box
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def check_box(box: Any, height: int, width: int) -> None:
    """See that a box is left, top, width and height inside a picture.

    Raises:
        ValueError: it is not.
    """
    if not is_box(box):
        raise ValueError(f"has the box {box}, which must be four numbers")
    left, top, box_width, box_height = box
    if not np.isfinite(box).all():
        raise ValueError(f"has the box {box}, whose numbers must be finite")
    if box_width <= 0 or box_height <= 0:
        raise ValueError(f"has an empty box, {box_width:g} wide and {box_height:g} high")
    right, bottom = left + box_width, top + box_height
    if min(left, top) < -ROUNDING or right > width + ROUNDING or bottom > height + ROUNDING:
        raise ValueError(
            f"has a box from {left:g}, {top:g} to {right:g}, {bottom:g}, outside the picture of {width}×{height} pixels"
        )
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        raise ValueError(f"has a box from {left:g}, {top:g} to {right:g}, {bottom:g}, of which nothing is inside")


def check_class(label: Any, crowd: Any, num_labels: int) -> None:
    """See that a class exists, and that an object is a crowd or none.

    Raises:
        ValueError: it does not, or `crowd` is neither 0 nor 1.
    """
    if label is None:
        raise ValueError("has no class")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
        raise ValueError(f"is of class {label!r}, but there are {num_labels} classes, counted from 0")
    if crowd not in (0, 1):
        raise ValueError(f"has {crowd!r} for iscrowd, which must be 0 or 1")


def as_mask(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A mask in COCO's compressed run-length code.

    Args:
        segmentation: polygons, each `[x, y, x, y, …]`; run lengths `{"size", "counts"}`, compressed or not; or either
            as JSON.

    Raises:
        ValueError: it is none of these, of another size than the picture, or empty.
    """
    given = segmentation
    if isinstance(segmentation, str):
        segmentation = json.loads(segmentation) if segmentation[:1] in ("[", "{") else None
    if not given:
        raise ValueError("has no mask, which this detector needs")
    if isinstance(segmentation, dict):
        mask = _of_run_lengths(segmentation, height, width)
    elif isinstance(segmentation, (list, tuple)):
        mask = _of_polygons(segmentation, height, width)
    else:
        raise ValueError(f"has the mask {given}, which must be polygons or run lengths")
    if not coco_masks.area(mask):
        raise ValueError("has a mask without a pixel")
    return mask


def _of_run_lengths(segmentation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"has a mask of size {size}, but the picture is {height} high and {width} wide")
    if isinstance(counts, (list, tuple)):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("has run lengths that are not all whole numbers from 0 on")
        if sum(counts) != height * width:
            raise ValueError(f"has run lengths for {sum(counts)} pixels, but the picture has {height * width}")
        return coco_masks.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    try:
        mask = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
        if not coco_masks.decode(mask).shape == (height, width):
            raise ValueError
        return mask
    except Exception:  # the decoder raises errors of several kinds
        raise ValueError("has run lengths that cannot be decoded") from None


def _of_polygons(polygons: Any, height: int, width: int) -> dict[str, Any]:
    try:  # some files have each pair in a list of its own
        flat = [np.asarray(polygon, float).ravel() for polygon in polygons]
    except (TypeError, ValueError):
        raise ValueError("has a polygon that is no list of numbers") from None
    if not all(len(numbers) >= 6 and len(numbers) % 2 == 0 for numbers in flat):
        lengths = [len(numbers) for numbers in flat]
        raise ValueError(f"has polygons of {lengths} numbers, which must be pairs of x and y, three pairs at least")
    points = np.concatenate([numbers.reshape(-1, 2) for numbers in flat])
    if not np.isfinite(points).all():
        raise ValueError("has a polygon whose numbers must be finite")
    if points.min() < -ROUNDING or (points > np.array([width, height]) + ROUNDING).any():
        raise ValueError(f"has a polygon outside the picture of {width}×{height} pixels")
    return coco_masks.merge(coco_masks.frPyObjects([numbers.tolist() for numbers in flat], height, width))
