# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The splits that a run trains and evaluates on: chosen, held out if need be, loaded into memory or streamed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import datasets
import PIL.Image
import torch
from accelerate.utils import broadcast_object_list

from ..data.samples import ImageDataset, PictureDataset, evaluation_pixels
from ..data.shards import Shards, StreamedImageDataset, find_shards
from ..data.sources import EVALUATION_SPLITS, find_data_files, hold_out, pick_split
from ..image_processing_vitae import ViTAEImageProcessor
from .arguments import ImageArguments, RunArguments, ViTAETrainingArguments


HELD_OUT = "held_out"
"""Name of the split that is held out of the training images."""


def choose_splits(run: RunArguments, available: Iterable[str], can_hold_out: bool = False) -> None:
    """Set `train_split` and `eval_split` to available splits, or `eval_split` to `HELD_OUT`.

    Raises:
        ValueError: a split is missing; the message lists those there are.
    """
    available = list(available)
    run.train_split = pick_split(available, run.train_split)
    if run.eval_split is None and can_hold_out and not set(EVALUATION_SPLITS) & set(available):
        run.eval_split = HELD_OUT
    else:
        run.eval_split = pick_split(available, *([run.eval_split] if run.eval_split else EVALUATION_SPLITS))


def load_splits(
    run: ImageArguments, training: ViTAETrainingArguments, load: Callable[..., datasets.DatasetDict]
) -> datasets.DatasetDict:
    """The splits that the run needs: under `--streaming` the one to evaluate alone.

    Args:
        load: `(source, name, splits, image_column=…)` to splits, such as [`load_images`].
    """
    with training.main_process_first(desc="data"):
        choose_splits(run, find_data_files(run.dataset, run.dataset_name), can_hold_out=not run.streaming)
        wanted = {run.eval_split} if run.streaming else {run.train_split, run.eval_split} - {HELD_OUT}
        splits = load(run.dataset, run.dataset_name, sorted(wanted), image_column=run.image_column_name)
        if run.eval_split == HELD_OUT:
            parts = hold_out(splits[run.train_split], run.eval_share, training.data_seed)
            splits[run.train_split], splits[HELD_OUT] = parts
    return splits


def find_stream(run: ImageArguments, training: ViTAETrainingArguments, **options: Any) -> Shards | None:
    """Under `--streaming`, the shards of the training images; the first process counts their rows for all.

    Args:
        options: of [`find_shards`]: `labelled`, `names`, `label_column`.
    """
    if not run.streaming:
        return None
    shards: list[Shards | None] = [None]
    if training.process_index == 0:
        options["image_column"] = run.image_column_name
        shards = [find_shards(run.dataset, run.dataset_name, run.train_split, **options)]
    return broadcast_object_list(shards)[0]


def training_images(
    run: ImageArguments,
    training: ViTAETrainingArguments,
    source: datasets.Dataset | Shards,
    transform: Callable[[PIL.Image.Image], torch.Tensor],
    num_labels: int | None = None,
) -> PictureDataset:
    """The training images, in memory or streamed.

    Args:
        source: the training split, or its shards.
        transform: upright RGB picture -> tensor.
        num_labels: how many classes a stream may have; none: it has no labels.
    """
    options: dict[str, Any] = {"on_bad_sample": run.on_bad_sample, "seed": training.seed}
    if not isinstance(source, Shards):
        return ImageDataset(source, transform, **options)
    return StreamedImageDataset(
        source,
        transform,
        training.train_batch_size,
        shuffle_buffer=run.shuffle_buffer,
        drop_last=training.dataloader_drop_last,
        num_labels=num_labels,
        rank=training.process_index,
        world_size=training.world_size,
        **options,
    )


def evaluation_images(
    run: ImageArguments, split: datasets.Dataset, processor: ViTAEImageProcessor, drop_bad: bool = False
) -> ImageDataset:
    """A split as the image processor prepares it.

    Args:
        drop_bad: whether a skipped picture leaves a gap, or the next one takes its place.
    """
    return ImageDataset(split, partial(evaluation_pixels, processor), run.on_bad_sample, drop_bad)
