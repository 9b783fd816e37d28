# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""From rows with undecoded pictures to batches: what cannot be read is named or counted, and draws can be repeated."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers.utils import logging

from ..image_processing_vitae import to_rgb


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""Label of no image: losses leave it out (torch's `ignore_index`), and metrics must."""


class PictureDataset:
    """What data sets in memory and streamed ones share: reading, counting bad pictures, seeding the transform.

    Attributes:
        deals_rows (`bool`): whether it gives each process its own rows itself, and a data loader must not.

    Args:
        transform: upright RGB picture -> tensor.
        on_bad_sample: what to do about a picture that cannot be read or has no label.
        seed: of a random transform. What it draws depends on seed, epoch ([`set_epoch`]) and sample alone, so that a
            resumed run sees the same pictures; other random states are left as they are.
        num_labels: labels from this number on are bad; none: not checked.
    """

    deals_rows = False

    def __init__(
        self,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        on_bad_sample: Literal["error", "skip"] = "error",
        seed: int | None = None,
        num_labels: int | None = None,
    ):
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {on_bad_sample!r}')
        self.transform, self.on_bad_sample, self.seed = transform, on_bad_sample, seed
        self.num_labels = num_labels
        # shared with the workers of a data loader; each counts in a place of its own
        self._epoch, self._batches_done = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))
        self._skipped = torch.zeros(1024, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def batches_done(self) -> int:
        """How many batches of this epoch were trained before the run was resumed."""
        return int(self._batches_done)

    @batches_done.setter
    def batches_done(self, count: int) -> None:
        self._batches_done.fill_(count)

    @property
    def skipped(self) -> int:
        """How often a bad sample has been met so far."""
        return int(self._skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def read_picture(self, row: dict, name: str) -> PIL.Image.Image | None:
        """The picture of a row, or none if it is bad and to be skipped, which is then counted.

        Args:
            row: with an undecoded `image` and, unless the data are without labels, a `label`.
            name: of the row, for a picture without a path.
        """
        try:
            return decode(row, self.num_labels, name)
        except ValueError as error:
            if self.on_bad_sample == "error":
                raise
            logger.warning("skipped: %s", error)
            worker = get_worker_info()
            self._skipped[worker.id % len(self._skipped) if worker else 0] += 1
            return None

    def make_sample(self, picture: PIL.Image.Image, row: dict, name: str | int, *position: int) -> dict:
        """`{"pixel_values", "labels", "names"}`, the last for messages: a path, or a row's number.

        A row without `label` gives no `labels`.
        """
        labels = {"labels": row["label"]} if "label" in row else {}
        with seeded(self.seed, *position):
            return {"pixel_values": self.transform(picture), **labels, "names": name}


class ImageDataset(PictureDataset, Dataset):
    """One split as `{"pixel_values", "labels", "names"}` for the Trainer.

    Indices from `len` up are the same pictures again, which a random transform makes other ones
    ([`RepeatedAugmentation`]); an iteration over the split ends at `len`.

    A picture that cannot be read, or one without a label, is an error that names it (`on_bad_sample="error"`), or is
    counted in `skipped` with a warning (`"skip"`): then the next good picture takes its place, so that batches keep
    their size, unless `drop_bad`, as for evaluation, where the sample becomes `None` for [`collate`] to blank out.

    Args:
        split: with undecoded `image` and `label`, as [`load_labelled_images`] gives it; without `label`, its samples
            have no `labels`.
        transform: upright RGB picture -> tensor.
        seed: see [`PictureDataset`].
    """

    def __init__(
        self,
        split: Sequence[dict],
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
            name = f"row {candidate % len(self.split)}"
            picture = self.read_picture(row, name)
            if picture is not None:
                return self.make_sample(picture, row, row["image"]["path"] or name, self.epoch, index)
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

    def __init__(self, dataset: ImageDataset, repeats: int):
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


def decode(row: dict, num_labels: int | None = None, name: str = "a row") -> PIL.Image.Image:
    """The upright RGB picture of a row with an undecoded `image`.

    Raises:
        ValueError: the picture is missing or damaged, or the row's `label`, if it has the column, is empty, or
            `num_labels` or more, or text; the message has the file, or the row's name where there is none.
    """
    label, where = row.get("label", 0), place(row["image"], name)
    if isinstance(label, str):
        raise ValueError(f"{where} has label {label!r}, which is none of the classes")
    if label is None or label < 0:
        raise ValueError(f"{where} has no label")
    if num_labels is not None and label >= num_labels:
        raise ValueError(f"{where} has label {label}, but there are {num_labels} classes, counted from 0")
    return decode_image(row["image"], name)


def place(image: dict | None, name: str) -> str:
    """Where an undecoded image is from: its file, or the name of its row; an error if there is no picture."""
    image = image or {}
    where = image.get("path") or name
    if not image.get("bytes") and not image.get("path"):
        raise ValueError(f"{where} has no picture")
    return where


def decode_image(image: dict | None, name: str, convert: Callable = to_rgb):
    """What `convert` makes of an undecoded image; see [`decode`]."""
    where = place(image, name)
    try:
        with PIL.Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as picture:
            return convert(picture)
    except Exception as error:  # Pillow's plugins raise of every kind
        raise ValueError(f"cannot read {where}: {error}") from error


def evaluation_pixels(processor, picture: PIL.Image.Image) -> torch.Tensor:
    """What an image processor makes of one picture: with `functools.partial`, the transform of an evaluation."""
    return processor(picture, return_tensors="pt").pixel_values[0]


def as_pictures(pixel_values: torch.Tensor, image_mean: list[float], image_std: list[float]) -> np.ndarray:
    """Normalised pixels `(B, 3, height, width)` -> uint8 `(B, height, width, 3)`, what is NaN in grey."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (image_mean, image_std))
    pixels = pixel_values.float().cpu() * std + mean
    return (pixels.nan_to_num(0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def collate(samples: list[dict | None]) -> dict[str, torch.Tensor]:
    """A batch of samples, with zeros and `IGNORED_LABEL` in place of each that was dropped.

    So batches keep their size, and what several processes evaluate can be put together again.

    Raises:
        ValueError: every sample was dropped.
    """
    if all(sample is None for sample in samples):
        raise ValueError("every picture of this batch was skipped: use larger batches, or mend the data")
    good = next(sample for sample in samples if sample is not None)
    blank = {"pixel_values": torch.zeros_like(good["pixel_values"]), "labels": IGNORED_LABEL, "names": None}
    samples = [blank if sample is None else sample for sample in samples]
    labels = {"labels": torch.tensor([sample["labels"] for sample in samples])} if "labels" in good else {}
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        **labels,
        "names": [sample["names"] for sample in samples],
    }
