# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A row for each picture: its label and scores, what the classifier reads, or why it could not be read."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..layers_vitae import grid_tokens
from ..loading import any_size_options, class_scores, label_names
from ..modeling_vitae import ViTAEForPreTraining
from .reading import Batch, as_item, check_resizes, chunks, read


Outputs = tuple[list[np.ndarray], float]
"""Scores `(B, top_k)`, numbers of labels `(B, top_k)` and features `(B, C)`, as far as they are wanted; and seconds."""


@dataclass
class Seconds:
    """Where the time of a run went.

    Attributes:
        waiting: for pictures, of the process that runs the model.
        reading, decoding: of all workers together.
        model: of all threads that run it together.
        writing: as long as the next part waited for it.
    """

    waiting: float = 0.0
    reading: float = 0.0
    decoding: float = 0.0
    model: float = 0.0
    writing: float = 0.0


def usable_cores() -> int:
    """The cores that this process may use, if those that torchrun started beside it on this machine use as many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def predict(
    model: PreTrainedModel,
    processor: Any,
    pictures: Iterable[Any],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    top_k: int = 5,
    embeddings: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Labels and features of pictures, a row for each, in their order; a picture that cannot be read has a row too.

    Args:
        model: a classifier, a model without a head or a masked autoencoder, on the device to use. It is put into
            evaluation mode; [`prepare_for_inference`] makes it faster.
        processor: its image processor.
        pictures: paths, URLs, bytes of files, undecoded images of `datasets`, or whatever the processor takes. They are
            asked for as they are needed, so there may be any number.
        batch_size: pictures that the model takes at once.
        num_workers: processes that read pictures; 0: this one does.
        top_k: how many of the best labels a row has.
        embeddings: `"float16"` or `"float32"`, to have what the classifier reads in the rows; models without a
            classifier always give it, by default in float32.

    Yields:
        `path` (where the picture has none, `picture 0` and so on), `label`, `score`, `labels`, `scores` (the best
        first; all four are `None` without a classifier), `error` (`None`, or why there is nothing else) and, when asked
        for, `embedding` `(C,)`. Scores are probabilities: of one label or, if the model's `problem_type` is
        multi-label, of each by itself.

    Raises:
        ValueError: `embeddings` is neither of the two, `top_k` is below 1, or the processor does not resize.

    Example:

    ```python
    >>> for row in predict(model, processor, Path("pictures").rglob("*.jpg"), num_workers=4):
    ...     print(row["path"], row["label"], row["score"])
    ```
    """
    items = (as_item(picture, number) for number, picture in enumerate(pictures))
    batches = read(processor, chunks([("", items)], batch_size), num_workers, model.device.type == "cuda")
    for _, rows in Predictor(model, processor, top_k, embeddings).run(batches):
        yield from rows


@dataclass
class Predictor:
    """Runs a model on batches of uint8 pixels, which it normalises on the model's device.

    Args:
        model, processor, top_k, embeddings: see [`predict`].
    """

    model: PreTrainedModel
    processor: Any
    top_k: int = 5
    embeddings: str | None = None
    seconds: Seconds = field(default_factory=Seconds)

    def __post_init__(self) -> None:
        if self.embeddings not in (None, "float16", "float32"):
            raise ValueError(f'`embeddings` must be "float16" or "float32", got {self.embeddings!r}')
        if self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}")
        if self.model.training:
            self.model.eval()
        self.is_warm = False  # layers pack their weights in the first batch, which must be alone then
        self.labels = list(label_names(self.model.config).values()) if self.has_classifier else []
        if not self.has_classifier:
            self.embeddings = self.embeddings or "float32"

    @property
    def has_classifier(self) -> bool:
        return hasattr(self.model, "classifier") and bool(self.model.config.num_labels)

    def run(self, batches: Iterator[Batch], runners: int = 0) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Each batch with its rows, in order.

        Args:
            batches: to be taken as they are needed.
            runners: how many batches go through the model at a time, each in a thread of its own, which on a CPU is
                then all that computes it; 0: one, in this thread.
        """
        alone = partial(torch.set_num_threads, 1) if self.model.device.type == "cpu" else None
        with ThreadPoolExecutor(runners, initializer=alone) if runners else nullcontext() as pool:
            under_way: deque[tuple[Batch, Callable[[], Outputs]]] = deque()
            for batch in self.arriving(batches):
                if pool is None:
                    under_way.append((batch, partial(self.compute, batch.pixel_values)))
                else:
                    under_way.append((batch, pool.submit(self.compute, batch.pixel_values).result))
                if not self.is_warm or len(under_way) > runners:
                    yield self.finish(*under_way.popleft())
            while under_way:
                yield self.finish(*under_way.popleft())

    def arriving(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds.waiting += time.perf_counter() - started
            if batch is None:
                return
            self.seconds.reading += batch.reading_s
            self.seconds.decoding += batch.decoding_s
            yield batch

    def finish(self, batch: Batch, result: Callable[[], Outputs]) -> tuple[Batch, list[dict[str, Any]]]:
        outputs, seconds = result()
        self.seconds.model += seconds
        self.is_warm |= bool(outputs)
        return batch, self.rows_of(batch, outputs)

    @torch.inference_mode()
    def compute(self, pixel_values: torch.Tensor | None) -> Outputs:
        """What the model makes of pixels, as far as it is wanted, and the seconds that it takes."""
        if pixel_values is None:
            return [], 0.0
        started = time.perf_counter()
        pixel_values = self.normalise(pixel_values.to(self.model.device, non_blocking=True)).to(self.model.dtype)
        logits, features = self.forward(pixel_values)
        outputs: list[torch.Tensor] = []
        if logits is not None:
            scores = class_scores(self.model.config, logits.float())
            outputs += scores.topk(min(self.top_k, scores.shape[1]))
        if self.embeddings:
            outputs.append(features.to(getattr(torch, self.embeddings)))
        found = [output.cpu().numpy() for output in outputs]
        return found, time.perf_counter() - started

    def try_out(self) -> None:
        """Run the model on a black picture of the size that all pictures get.

        Raises:
            ValueError: the model does not take this size, or the processor does not resize.
        """
        check_resizes(self.processor)
        size = self.processor.size
        channels = self.model.config.num_channels
        self.compute(torch.zeros((1, channels, size["height"], size["width"]), dtype=torch.uint8))

    def normalise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the processor would have done: rescaled and normalised, in float32."""
        processor = self.processor
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        mean, std = (torch.as_tensor(values, device=pixel_values.device) / factor for values in (mean, std))
        return (pixel_values.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits, if there is a classifier, and features: what a classifier reads or would read."""
        model: Any = self.model
        any_size = any_size_options(model)
        if isinstance(model, ViTAEForPreTraining):  # the mean of all patches, none of which is masked
            return None, model.encode(pixel_values, **any_size)[:, 1:].mean(1)
        if self.has_classifier:
            outputs = model(pixel_values, **any_size)
            return outputs.logits, outputs.pooler_output
        outputs = model.base_model(pixel_values, **any_size)
        if outputs.pooler_output is not None:
            return None, outputs.pooler_output
        has_class_token = getattr(model.config, "has_class_token", False)  # a backbone, which has no pooling layer
        return None, grid_tokens(outputs.last_hidden_state, has_class_token).mean(1)

    def rows_of(self, batch: Batch, outputs: list[np.ndarray]) -> list[dict[str, Any]]:
        """The rows of a batch. Scores or features that are not finite are an error of the picture's row."""
        columns = list(outputs)
        embeddings = columns.pop() if self.embeddings and columns else None
        scores, numbers = columns or (None, np.empty(0))
        rows = []
        for index, (name, error) in enumerate(zip(batch.names, batch.errors)):
            row: dict[str, Any] = dict.fromkeys(("path", "label", "score", "labels", "scores", "error"))
            row |= {"path": name, "error": error} | ({"embedding": None} if self.embeddings else {})
            found = [column[index] for column in (scores, embeddings) if column is not None]
            if error is None and not all(np.isfinite(values).all() for values in found):
                row["error"] = f"the model gave {name} numbers that are not finite"
            elif error is None:
                if scores is not None:
                    row["labels"] = [self.labels[number] for number in numbers[index].tolist()]
                    row["scores"] = scores[index].tolist()
                    row["label"], row["score"] = row["labels"][0], row["scores"][0]
                if embeddings is not None:
                    row["embedding"] = embeddings[index]
            rows.append(row)
        return rows
