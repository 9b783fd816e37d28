# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Labelled pictures through `datasets`, with what to do about those that cannot be read."""

import multiprocessing
import random
from collections.abc import Callable
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from .image_processing_vitae import to_rgb


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""Label of no image: losses leave it out (torch's `ignore_index`), and metrics must."""


def load_labelled_images(source: str, name: str | None = None) -> datasets.DatasetDict:
    """Load a data set by Hub name or local folder (parquet files, or one folder of images for each class).

    Args:
        source: as `datasets.load_dataset` takes it.
        name: its configuration, where it has several.

    Returns:
        Its splits, with the pictures in a column `image` that is not decoded yet and the labels in a column `label`.

    Raises:
        ValueError: there is no single column of images and of class labels; the message lists the columns.
    """
    splits = datasets.load_dataset(source, name)
    features = next(iter(splits.values())).features
    columns = {}
    for role, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        matches = [column for column, feature in features.items() if isinstance(feature, kind)]
        if len(matches) != 1:
            raise ValueError(
                f"{source} must have one {kind.__name__} column for the {role}s, got {matches} of {features}"
            )
        columns[matches[0]] = role
    splits = splits.select_columns(list(columns))
    splits = splits.rename_columns({column: role for column, role in columns.items() if column != role})
    return splits.cast_column("image", datasets.Image(decode=False))


def class_names(splits: datasets.DatasetDict) -> dict[int, str]:
    """Class names by label, for `id2label`."""
    return dict(enumerate(next(iter(splits.values())).features["label"].names))


class LabelledImages(Dataset):
    """One split as `{"pixel_values", "labels"}` samples for the Trainer.

    A picture that cannot be read, or one without a label, is an error that names it (`on_bad_sample="error"`), or is
    counted in `skipped` with a warning (`"skip"`): then the next good picture takes its place, so that batches keep
    their size, unless `drop_bad`, as for evaluation, where the sample becomes `None` for [`collate`] to blank out.

    Args:
        split: with undecoded `image` and `label`, as [`load_labelled_images`] gives it.
        transform: upright RGB picture -> tensor.
        seed: of a random transform. What it draws depends on seed, epoch ([`set_epoch`]) and sample alone, so that a
            resumed run, or one with other workers, sees the same pictures; other random states are left as they are.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        on_bad_sample: Literal["error", "skip"] = "error",
        drop_bad: bool = False,
        seed: int | None = None,
    ):
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {on_bad_sample!r}')
        self.split, self.transform, self.on_bad_sample, self.drop_bad = split, transform, on_bad_sample, drop_bad
        self.seed = seed
        self._epoch = multiprocessing.Value("q", 0)
        self._skipped = multiprocessing.Value("q", 0)  # shared with the workers of a data loader

    @property
    def skipped(self) -> int:
        """How often a bad sample has been met so far."""
        return self._skipped.value

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict | None:
        for candidate in range(index, index + len(self.split)):
            row = self.split[candidate % len(self.split)]
            try:
                picture = decode(row)
            except ValueError as error:
                if self.on_bad_sample == "error":
                    raise
                logger.warning("skipped: %s", error)
                with self._skipped.get_lock():
                    self._skipped.value += 1
                if self.drop_bad:
                    return None
            else:
                with seeded(self.seed, self._epoch.value, index):
                    return {"pixel_values": self.transform(picture), "labels": row["label"]}
        raise ValueError(f"none of the {len(self.split)} pictures of this split can be read")


@contextmanager
def seeded(seed: int | None, *position: int):
    """Draws of `random`, NumPy and torch that depend on a seed and a position only, undone at the end; none without."""
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mixed = int(np.random.SeedSequence([seed, *position]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def decode(row: dict) -> PIL.Image.Image:
    """The upright RGB picture of a row with an undecoded `image`.

    Raises:
        ValueError: the picture is damaged, or its label is missing; the message names the file where there is one.
    """
    image = row["image"]
    where = image["path"] or f"a picture of {len(image['bytes'])} bytes"
    if row["label"] is None or row["label"] < 0:
        raise ValueError(f"{where} has no label")
    try:
        with PIL.Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as picture:
            return to_rgb(picture)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error


def collate(samples: list[dict | None]) -> dict[str, torch.Tensor]:
    """A batch of samples, with zeros and `IGNORED_LABEL` in place of each that was dropped.

    So batches keep their size, and what several processes evaluate can be put together again.

    Raises:
        ValueError: every sample was dropped.
    """
    if all(sample is None for sample in samples):
        raise ValueError("every picture of this batch was skipped: use larger batches, or mend the data")
    good = next(sample for sample in samples if sample is not None)
    blank = {"pixel_values": torch.zeros_like(good["pixel_values"]), "labels": IGNORED_LABEL}
    samples = [blank if sample is None else sample for sample in samples]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }
