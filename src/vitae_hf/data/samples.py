# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets whose samples the networks train on: a picture's pixels, its label, and its name for messages.

Bad pictures are named or counted. The draws of a random transform depend on the seed and the place of a sample alone.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from transformers.utils import logging

from .pictures import decode


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""The label of a blank sample, in place of a bad picture. Losses skip it (torch's `ignore_index`); metrics must too."""


class PictureDataset:
    """What data sets in memory and streamed ones share: reading pictures, counting bad ones, seeding the transform.

    Attributes:
        deals_rows (`bool`): whether the data set itself shares its rows out among the processes. If it does, the data
            loader must not.

    Args:
        transform: makes a tensor of an upright RGB picture; none if rows are only read.
        on_bad_sample: what to do about a picture that cannot be read or has no label.
        seed: of a random transform. What it draws depends on seed, epoch ([`set_epoch`]) and sample alone, so that a
            resumed run sees the same pictures; the random states of the process stay as they are.
        num_labels: how many classes there are; a label that is none of them is bad; default: labels are not checked.

    Raises:
        ValueError: `on_bad_sample` is neither `"error"` nor `"skip"`.
    """

    deals_rows: ClassVar[bool] = False

    def __init__(
        self,
        transform: Callable[..., Any] | None,
        on_bad_sample: Literal["error", "skip"] = "error",
        seed: int | None = None,
        num_labels: int | None = None,
    ):
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {on_bad_sample!r}')
        self.transform: Any = transform
        self.on_bad_sample = on_bad_sample
        self.seed = seed
        self.num_labels = num_labels
        # In memory that the workers of a data loader share with this process; each worker counts in a place of its own.
        self._epoch, self._batches_done = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))
        self._skipped = torch.zeros(1024, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def batches_done(self) -> int:
        """How many batches of this epoch a resumed run had trained before it stopped."""
        return int(self._batches_done)

    @batches_done.setter
    def batches_done(self, count: int) -> None:
        self._batches_done.fill_(count)

    @property
    def skipped(self) -> int:
        """How often a bad sample has been met so far."""
        return int(self._skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        """Draw from now on what a random transform draws in this epoch."""
        self._epoch.fill_(epoch)

    def read_picture(self, row: dict[str, Any], name: str) -> PIL.Image.Image | None:
        """The picture of a row. A bad one that is to be skipped gives `None`, and is counted in `skipped`.

        Args:
            row: with an undecoded `image` and, where the data have labels, a `label`.
            name: of the row, for messages about a picture without a path.

        Raises:
            ValueError: the picture is bad, and `on_bad_sample` is `"error"`.
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

    def make_sample(
        self, picture: PIL.Image.Image, row: dict[str, Any], name: str | int, *position: int
    ) -> dict[str, Any]:
        """`{"pixel_values", "labels", "names"}` of a row, without `labels` if it has no `label`.

        Args:
            picture: of the row.
            row: whose `label` is taken.
            name: for messages, a path or the number of a row.
            position: what the draws of the transform depend on beside the seed.
        """
        labels = {"labels": row["label"]} if "label" in row else {}
        with seeded(self.seed, *position):
            return {"pixel_values": self.transform(picture), **labels, "names": name}


class ImageDataset(PictureDataset, Dataset[dict[str, Any]]):
    """One split in memory, as `{"pixel_values", "labels", "names"}` for the Trainer.

    Indices from `len` on stand for the same pictures again, for which the transform draws anew
    ([`RepeatedAugmentation`]). Iterating over the data set ends at `len`.

    A bad picture is an error that names it (`on_bad_sample="error"`), or is counted in `skipped` with a warning
    (`"skip"`). The next good picture takes the place of a skipped one, so that batches keep their size. With
    `drop_bad`, as evaluations need it, no other picture does, but a blank one: zeros, with `IGNORED_LABEL` and no name.
    The results of several processes can then be put together in order.

    Args:
        split: with undecoded `image` and `label`, as [`load_labelled_images`] gives it; without `label`, its samples
            have no `labels`.
        drop_bad: see above.
        transform, on_bad_sample, seed: see [`PictureDataset`].
    """

    def __init__(
        self,
        split: Sequence[dict[str, Any]],
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        on_bad_sample: Literal["error", "skip"] = "error",
        drop_bad: bool = False,
        seed: int | None = None,
    ):
        label = getattr(split, "features", {}).get("label")
        super().__init__(transform, on_bad_sample, seed, getattr(label, "num_classes", None))
        self.split = split
        self.drop_bad = drop_bad

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        for candidate in range(index, index + len(self.split)):
            row = self.split[candidate % len(self.split)]
            name = f"row {candidate % len(self.split)}"
            picture = self.read_picture(row, name)
            if picture is not None:
                return self.make_sample(picture, row, row["image"]["path"] or name, self.epoch, index)
            if self.drop_bad:
                zeros = torch.zeros_like(self.transform(PIL.Image.new("RGB", (32, 32))))
                return {"pixel_values": zeros, "labels": IGNORED_LABEL, "names": None}
        raise ValueError(f"none of the {len(self.split)} pictures of this split can be read")


class RepeatedAugmentation(Sampler[int]):
    """Indices that put each picture `repeats` times in a row, so that one batch has it in several transformations.

    The number of samples in an epoch stays the same, so that an epoch has only a part of the pictures.

    Args:
        dataset: whose epoch and seed the order follows.
        repeats: how often each picture is taken.

    Source: Hoffer et al. 2020, "Augment your batch"; Touvron et al. 2021, DeiT (three times).
    """

    def __init__(self, dataset: ImageDataset, repeats: int):
        self.dataset = dataset
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rows = len(self.dataset)
        order = np.random.default_rng([self.dataset.seed or 0, self.dataset.epoch]).permutation(rows)
        return (int(order[place // self.repeats]) + place % self.repeats * rows for place in range(rows))


@contextmanager
def seeded(seed: int | None, *position: int) -> Iterator[None]:
    """Within, what `random`, NumPy and torch draw depends on seed and position alone; afterwards all is as before.

    Without a seed, nothing changes.
    """
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


def evaluation_pixels(processor: Any, picture: PIL.Image.Image) -> torch.Tensor:
    """What an image processor makes of one picture: with `functools.partial`, the transform of an evaluation."""
    return processor(picture, return_tensors="pt").pixel_values[0]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples.

    Returns:
        `pixel_values` `(B, 3, height, width)`, `labels` `(B,)` if the samples have them, and `names`, a list.
    """
    labels = {"labels": torch.tensor([sample["labels"] for sample in samples])} if "labels" in samples[0] else {}
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        **labels,
        "names": [sample["names"] for sample in samples],
    }


def evenly_spread(rows: int, count: int) -> list[int]:
    """So many numbers of rows, from the first to the last; fewer if there are fewer rows."""
    return np.unique(np.linspace(0, rows - 1, count).astype(int)).tolist()


class _AsRead(Dataset[Any]):
    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data.read(index)


def _unchanged(row: Any) -> Any:
    return row


def rows_as_read(data: Any, num_workers: int = 0) -> DataLoader[Any]:
    """The rows of a data set as its `read(index)` gives them, in order, read by worker processes if there are any."""
    return DataLoader(_AsRead(data), None, collate_fn=_unchanged, num_workers=num_workers)  # type: ignore[arg-type]
