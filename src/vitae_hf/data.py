# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Labelled pictures through `datasets`, with what to do about those that cannot be read."""

import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from .image_processing_vitae import to_rgb


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""Label of no image: losses leave it out (torch's `ignore_index`), and metrics must."""


def load_labelled_images(
    source: str, name: str | None = None, splits: list[str] | None = None, names: list[str] | None = None
) -> datasets.DatasetDict:
    """Load a data set by Hub name or local folder: parquet files, WebDataset tars, or one folder of images per class.

    Args:
        source: as `datasets.load_dataset` takes it.
        name: its configuration, where it has several.
        splits: read the files of these alone; default: all.
        names: of the classes, where the data set does not have them.

    Returns:
        Its splits, with the pictures in a column `image` that is not decoded yet and the labels in a column `label`.

    Raises:
        ValueError: there is no single column of images and of labels, or no names for the labels; the message lists the
            columns.
    """
    files = None
    if splits is not None:
        files = datasets.load_dataset_builder(source, name).config.data_files
        files = {split: list(files[split]) for split in splits}
    data = datasets.load_dataset(source, name, data_files=files)
    columns = find_columns(next(iter(data.values())).features, source)
    data = data.select_columns(list(columns))
    data = data.rename_columns({column: role for column, role in columns.items() if column != role})
    label = next(iter(data.values())).features["label"]
    if not isinstance(label, datasets.ClassLabel):
        if names is None:
            raise ValueError(f"the labels of {source} are numbers without names: give the names of the classes")
        data = data.cast_column("label", datasets.ClassLabel(names=names))
    return data.cast_column("image", datasets.Image(decode=False))


def find_columns(features: datasets.Features, source: str) -> dict[str, str]:
    """Which columns are the `image` and the `label`: the only pictures, and the only class labels, else whole numbers
    that are called label, labels or, as in WebDataset, cls.

    Raises:
        ValueError: there is not one of each.
    """
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        numbers = (column for column in ("label", "labels", "cls") if column in features)
        labels = [column for column in numbers if "int" in getattr(features[column], "dtype", "")]
    for role, matches in (("image", images), ("label", labels)):
        if len(matches) != 1:
            raise ValueError(f"{source} must have one column for the {role}s, got {matches} of {features}")
    return {images[0]: "image", labels[0]: "label"}


def pick_split(available: Iterable[str], *names: str) -> str:
    """The first of these splits that there is.

    Raises:
        ValueError: none is; the message lists those there are.
    """
    for name in names:
        if name in available:
            return name
    raise ValueError(f"there is no split {' or '.join(map(repr, names))}; there are {', '.join(map(repr, available))}")


def class_names(splits: datasets.DatasetDict) -> dict[int, str]:
    """Class names by label, for `id2label`."""
    return dict(enumerate(next(iter(splits.values())).features["label"].names))


class Samples:
    """What data sets in memory and streamed ones share: reading, counting bad pictures, seeding the transform.

    Args:
        transform: upright RGB picture -> tensor.
        on_bad_sample: what to do about a picture that cannot be read or has no label.
        seed: of a random transform. What it draws depends on seed, epoch ([`set_epoch`]) and sample alone, so that a
            resumed run, or one with other workers, sees the same pictures; other random states are left as they are.
    """

    def __init__(
        self,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        on_bad_sample: Literal["error", "skip"] = "error",
        seed: int | None = None,
    ):
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {on_bad_sample!r}')
        self.transform, self.on_bad_sample, self.seed = transform, on_bad_sample, seed
        # shared with the workers of a data loader
        self._epoch, self._batches_done, self._skipped = (multiprocessing.Value("q", 0) for _ in range(3))

    @property
    def epoch(self) -> int:
        return self._epoch.value

    @property
    def batches_done(self) -> int:
        """How many batches of this epoch were trained before the run was resumed."""
        return self._batches_done.value

    @batches_done.setter
    def batches_done(self, count: int) -> None:
        self._batches_done.value = count

    @property
    def skipped(self) -> int:
        """How often a bad sample has been met so far."""
        return self._skipped.value

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def read_picture(self, row: dict) -> PIL.Image.Image | None:
        """The picture of a row, or none if it is bad and to be skipped, which is then counted."""
        try:
            return decode(row)
        except ValueError as error:
            if self.on_bad_sample == "error":
                raise
            logger.warning("skipped: %s", error)
            with self._skipped.get_lock():
                self._skipped.value += 1
            return None

    def make_sample(self, picture: PIL.Image.Image, row: dict, name: str | int, *position: int) -> dict:
        """`{"pixel_values", "labels", "samples"}`, the last for messages: a path, or a row's number."""
        with seeded(self.seed, *position):
            return {"pixel_values": self.transform(picture), "labels": row["label"], "samples": name}


class LabelledImages(Samples, Dataset):
    """One split as `{"pixel_values", "labels", "samples"}` for the Trainer.

    Indices from `len` up are the same pictures again, which a random transform makes other ones
    ([`RepeatedAugmentation`]); an iteration over the split ends at `len`.

    A picture that cannot be read, or one without a label, is an error that names it (`on_bad_sample="error"`), or is
    counted in `skipped` with a warning (`"skip"`): then the next good picture takes its place, so that batches keep
    their size, unless `drop_bad`, as for evaluation, where the sample becomes `None` for [`collate`] to blank out.

    Args:
        split: with undecoded `image` and `label`, as [`load_labelled_images`] gives it.
        transform: upright RGB picture -> tensor.
        seed: see [`Samples`].
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        on_bad_sample: Literal["error", "skip"] = "error",
        drop_bad: bool = False,
        seed: int | None = None,
    ):
        super().__init__(transform, on_bad_sample, seed)
        self.split, self.drop_bad = split, drop_bad

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict | None:
        for candidate in range(index, index + len(self.split)):
            row = self.split[candidate % len(self.split)]
            picture = self.read_picture(row)
            if picture is not None:
                name = row["image"]["path"] or candidate % len(self.split)
                return self.make_sample(picture, row, name, self.epoch, index)
            if self.drop_bad:
                return None
        raise ValueError(f"none of the {len(self.split)} pictures of this split can be read")


class RepeatedAugmentation(Sampler):
    """Every picture of a batch several times, each time transformed otherwise; an epoch has as many samples as before.

    Args:
        dataset: whose epoch and seed the order follows.
        repeats: how often a picture is in its batch.

    Source: Hoffer et al. 2020, "Augment your batch"; Touvron et al. 2021, DeiT (three times).
    """

    def __init__(self, dataset: LabelledImages, repeats: int):
        self.dataset, self.repeats = dataset, repeats

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rows = len(self.dataset)
        order = np.random.default_rng([self.dataset.seed or 0, self.dataset.epoch]).permutation(rows)
        return (int(order[place // self.repeats]) + place % self.repeats * rows for place in range(rows))


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
    blank = {"pixel_values": torch.zeros_like(good["pixel_values"]), "labels": IGNORED_LABEL, "samples": None}
    samples = [blank if sample is None else sample for sample in samples]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "samples": [sample["samples"] for sample in samples],
    }
