# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics as classes of `evaluate`, without network: top-k accuracy, ReaL (ImageNet's cleaned labels), mean IoU."""

from typing import Any

import datasets
import evaluate
import numpy as np


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes have a higher score than the label, 0 for the top one; of equal scores the first is the higher.

    Args:
        scores: `(N, classes)`.
        labels: `(N,)` integers.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ties_before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return ((scores > own) | ties_before).sum(1)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images, or pixels, of class i (row) were taken for class j (column): `(num_classes, num_classes)`."""
    pairs = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


class TopKAccuracy(evaluate.Metric):
    """Share of images, in percent, whose label is among the k classes with the highest scores.

    `compute(predictions=scores, references=labels, ks=(1, 5))` takes scores `(N, classes)` and labels `(N,)`, at once
    or by `add_batch`, and returns `{"top1": …, "top5": …}`.

    Raises:
        ValueError: a label is not the index of a class, or a score is not finite, which has no rank.

    Example:

    ```python
    >>> TopKAccuracy().compute(predictions=[[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], references=[1, 1], ks=(1, 2))
    {'top1': 50.0, 'top2': 100.0}
    ```
    """

    def __init__(self, **kwargs: Any):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: Any, references: Any, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        if labels.min() < 0 or labels.max() >= scores.shape[1]:
            raise ValueError(
                f"labels must be from 0 to {scores.shape[1] - 1}, as there are {scores.shape[1]} classes; "
                f"got {labels.min()} to {labels.max()}"
            )
        if bad := int((~np.isfinite(scores)).any(1).sum()):
            raise ValueError(f"the scores of {bad} of {len(scores)} images are not finite")
        ranks = label_ranks(scores, labels)
        return {f"top{k}": float(100 * (ranks < k).mean()) for k in ks}


class ReaLAccuracy(evaluate.Metric):
    """Share of images, in percent, whose top class is one of the labels that people confirmed.

    `compute(predictions=classes, references=label_lists)` takes the predicted classes `(N,)` and for each image the
    list of right ones. Images without any do not count, as in the paper; `images` says how many did.

    Example:

    ```python
    >>> ReaLAccuracy().compute(predictions=[3, 1, 2], references=[[3, 4], [0], []])
    {'real': 50.0, 'images': 2}
    ```

    Source: Beyer et al. 2020, "Are we done with ImageNet?".
    """

    def __init__(self, **kwargs: Any):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Sequence(datasets.Value("int64"))}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = [prediction in labels for prediction, labels in zip(predictions, references) if len(labels)]
        return {"real": float(100 * np.mean(right)) if right else float("nan"), "images": len(right)}


class MeanIoU(evaluate.Metric):
    """Intersection over union of each class and its mean over classes, in percent, over all pixels of all images.

    `add_batch(predictions=classes, references=masks)` takes two arrays of whole numbers with the same shape, any shape,
    counts their pixels in a confusion matrix, and keeps nothing else. `compute()` gives the figures and begins
    anew; for small data it takes `predictions` and `references` too. A class that is neither in the masks nor predicted
    has no IoU and does not count in the mean.

    Args:
        names: of the classes.
        ignored: values of masks that do not count. By default 255, as masks have them, and -100, with which the Trainer
            fills up what it gathers from several processes.

    Raises:
        ValueError: the shapes differ, a value is not the index of a class or is one and ignored, or there is no pixel
            that counts.

    Example:

    ```python
    >>> figures = MeanIoU(["sky", "sea"]).compute(predictions=[[0, 0, 1]], references=[[0, 1, 1]])
    >>> figures["mean_iou"], figures["iou"]
    (50.0, {'sky': 50.0, 'sea': 50.0})
    ```
    """

    def __init__(self, names: list[str], ignored: tuple[int, ...] = (255, -100), **kwargs: Any):
        self.names: list[str] = list(names)
        self.ignored = ignored
        if classes := [value for value in ignored if 0 <= value < len(self.names)]:
            raise ValueError(f"{classes[0]} is a class of {len(self.names)} and among `ignored`, {ignored}")
        self.reset()
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        features = datasets.Features({"predictions": maps, "references": maps})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def reset(self) -> None:
        """Forget what was added."""
        self.confusion: np.ndarray = np.zeros((len(self.names), len(self.names)), np.int64)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count the pixels of one image."""
        self.add_batch(predictions=prediction, references=reference)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count the pixels of predictions and masks of the same shape."""
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.shape != references.shape:
            raise ValueError(f"predictions {predictions.shape} and masks {references.shape} must have one shape")
        counted = ~np.isin(references, self.ignored)
        predictions, references = predictions[counted].astype(np.int64), references[counted].astype(np.int64)
        for what, values in (("predictions", predictions), ("masks", references)):
            if values.size and not 0 <= values.min() <= values.max() < len(self.names):
                raise ValueError(
                    f"{what} must be from 0 to {len(self.names) - 1}, as there are {len(self.names)} classes, or one of"
                    f" {self.ignored} in masks; got {values.min()} to {values.max()}"
                )
        self.confusion += confusion_matrix(references, predictions, len(self.names))

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Figures of all that was added: `mean_iou`, `pixel_accuracy`, `mean_accuracy` (over classes that the masks
        have), `constant_mean_iou` (of giving every pixel the most frequent class), `iou` and `pixels` by class name.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        confusion = self.confusion
        self.reset()
        if not confusion.sum():
            raise ValueError("there is no pixel that counts: no masks, or all of them to be ignored")
        right, pixels = confusion.diagonal(), confusion.sum(1)
        union = pixels + confusion.sum(0) - right
        iou = 100 * right[union > 0] / union[union > 0]
        by_class = dict(zip(np.flatnonzero(union), iou.tolist()))
        return {
            "mean_iou": float(iou.mean()),
            "pixel_accuracy": float(100 * right.sum() / pixels.sum()),
            "mean_accuracy": float(100 * (right[pixels > 0] / pixels[pixels > 0]).mean()),
            "constant_mean_iou": float(100 * pixels.max() / pixels.sum() / (pixels > 0).sum()),
            "iou": {name: by_class.get(index) for index, name in enumerate(self.names)},
            "pixels": dict(zip(self.names, pixels.tolist())),
        }
