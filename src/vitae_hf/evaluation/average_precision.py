# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""COCO's average precision of boxes and masks as a class of `evaluate`, computed by pycocotools."""

import contextlib
import io
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


LEAST_SCORE = 0.001
"""Boxes below it do not count; so few of a picture's best hundred have less that the precision does not change."""
STATS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
"""What the first nine numbers of COCO's summary are."""


def corners_to_coco(boxes: Any) -> list[list[float]]:
    """Boxes `(N, 4)` as left, top, width and height, from left, top, right and bottom."""
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()


def run_lengths(masks: Any) -> list[dict[str, Any]]:
    """COCO's compressed run-length codes of masks `(N, height, width)`; codes stay as they are.

    Raises:
        ValueError: the masks have other values than 0 and 1.
    """
    if isinstance(masks, list) and all(isinstance(mask, dict) for mask in masks):
        return masks
    masks = np.asarray(masks)
    if not np.isin(masks, (0, 1)).all():
        raise ValueError(f"masks must be 0 or 1 at each pixel, got values from {masks.min()} to {masks.max()}")
    masks = masks.astype(np.uint8)
    return coco_masks.encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(masks) else []


def as_prediction(objects: dict[str, Any]) -> dict[str, Any]:
    """A picture's best hundred objects, of the tensors that [`as_objects`] gives, with masks in run-length codes."""
    kept = objects["scores"].argsort(descending=True)[:100]
    found = {name: value[kept].numpy() for name, value in objects.items()}
    return found | ({"masks": run_lengths(found["masks"])} if "masks" in found else {})


class MeanAveragePrecision(evaluate.Metric):
    """COCO's mean average precision, in percent, of the boxes that a detector found, and of their masks.

    `add(prediction=…, reference=…)` takes one picture. A prediction has `boxes` `(N, 4)` as left, top, right and bottom
    in pixels, `scores` and `labels` `(N,)`; a reference has `boxes` and `labels`, and may have `is_crowd` and `areas`
    `(N,)`. With masks both have `masks` too, `(N, height, width)` or run-length codes. `compute()` gives the figures
    and begins anew. A class without objects has no precision and does not count in the mean.

    Args:
        names: of the classes.
        with_masks: whether to measure masks too.

    Raises:
        ValueError: nothing was added, a label is none of the classes, or there are not as many boxes as labels, scores
            or masks.

    Example:

    ```python
    >>> boxes = [[10, 10, 30, 30], [50, 50, 60, 70]]
    >>> metric = MeanAveragePrecision(["cat", "dog"])
    >>> found = {"boxes": boxes[:1], "scores": [0.9], "labels": [0]}
    >>> metric.add(prediction=found, reference={"boxes": boxes, "labels": [0, 1]})
    >>> figures = metric.compute()
    >>> figures["map"], figures["ap"]
    (50.0, {'cat': 100.0, 'dog': 0.0})
    ```

    Source: Lin et al. 2014, "Microsoft COCO".
    """

    def __init__(self, names: list[str], with_masks: bool = False, **kwargs: Any):
        self.names: list[str] = list(names)
        self.with_masks = with_masks
        self.reset()
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        boxes = {"boxes": datasets.List(datasets.List(datasets.Value("float32")))}
        features = datasets.Features({"predictions": boxes, "references": boxes})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def reset(self) -> None:
        """Forget what was added."""
        self.pictures = 0
        self.truth: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Take the objects of one picture."""
        self.pictures += 1
        crowds = reference.get("is_crowd", np.zeros(len(reference["labels"])))
        boxes = corners_to_coco(reference["boxes"])
        truth = self._entries(reference, boxes)
        areas = reference.get("areas", [self._area(entry) for entry in truth])
        for entry, crowd, area in zip(truth, crowds, areas, strict=True):
            self.truth.append({**entry, "id": len(self.truth) + 1, "iscrowd": int(crowd), "area": float(area)})
        found = self._entries(prediction, corners_to_coco(prediction["boxes"]))
        self.found += [
            {**entry, "score": float(score)} for entry, score in zip(found, prediction["scores"], strict=True)
        ]

    @staticmethod
    def _area(entry: dict[str, Any]) -> float:
        """Pixels of a mask, else of a box, by which COCO tells small objects from large ones."""
        if "segmentation" in entry:
            return float(coco_masks.area(entry["segmentation"]))
        return entry["bbox"][2] * entry["bbox"][3]

    def _entries(self, objects: dict[str, Any], boxes: list[list[float]]) -> list[dict[str, Any]]:
        labels = [int(label) for label in objects["labels"]]
        if wrong := sorted(set(labels) - set(range(len(self.names)))):
            raise ValueError(f"labels must be from 0 to {len(self.names) - 1}, got {wrong}")
        entries: list[dict[str, Any]] = [
            {"image_id": self.pictures, "category_id": label, "bbox": box}
            for label, box in zip(labels, boxes, strict=True)
        ]
        if self.with_masks:
            for entry, mask in zip(entries, run_lengths(objects["masks"]), strict=True):
                entry["segmentation"] = mask
        return entries

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Take the objects of several pictures."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Figures of all that was added: those of `STATS`, and `ap` by class; of masks, each under `mask_…` too.

        A figure about which nothing is known, such as that of large objects where there are none, is `None`.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.pictures:
            raise ValueError("there is no picture to measure the precision on")
        figures = self._figures("bbox")
        if self.with_masks:
            figures |= {f"mask_{name}": value for name, value in self._figures("segm").items()}
        self.reset()
        return figures

    def _figures(self, kind: str) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # on which pycocotools says what it does
            truth = COCO()
            sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in self.truth if self.with_masks}
            images = [
                dict(zip(("id", "height", "width"), (number, *sizes.get(number, (0, 0)))))
                for number in range(1, self.pictures + 1)
            ]
            categories = [{"id": number, "name": name} for number, name in enumerate(self.names)]
            truth.dataset = {"images": images, "annotations": self.truth, "categories": categories}
            truth.createIndex()
            evaluation = COCOeval(truth, self._results(truth, kind), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (overlaps, recalls, classes): any size, 100 boxes
        by_class = [column[column > -1] for column in np.moveaxis(precision, 2, 0)]
        figures = {name: percent(value) for name, value in zip(STATS, evaluation.stats)}
        return {
            **figures,
            "ap": {name: percent(own.mean()) if own.size else None for name, own in zip(self.names, by_class)},
        }

    def _results(self, truth: COCO, kind: str) -> COCO:
        """What was found, without boxes where masks count, since boxes would decide which masks are small."""
        left_out = "bbox" if kind == "segm" else "segmentation"
        found = [{key: value for key, value in entry.items() if key != left_out} for entry in self.found]
        if found:
            return truth.loadRes(found)
        nothing = COCO()
        nothing.dataset = {**truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing


def percent(value: float) -> float | None:
    """A share in percent, without the tiny part that COCO's guard against 0/0 takes off; `None` for -1, its unknown."""
    return None if value < 0 else round(float(100 * value), 8)
