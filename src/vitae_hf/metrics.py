# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics as `evaluate` modules that need no network: top-k accuracy, and ReaL for ImageNet's cleaned labels."""

import datasets
import evaluate
import numpy as np


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes score higher than the label, 0 for the top one; ties go to the class with the lower index.

    Args:
        scores: `(N, classes)`.
        labels: `(N,)` integers.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ties_before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return ((scores > own) | ties_before).sum(1)


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

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
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

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Sequence(datasets.Value("int64"))}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        right = [prediction in labels for prediction, labels in zip(predictions, references) if len(labels)]
        return {"real": float(100 * np.mean(right)) if right else float("nan"), "images": len(right)}
