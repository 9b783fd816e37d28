# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Workers that make uint8 pixels of pictures, at the size of an image processor, and say why where they cannot."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import httpx
from torch.utils.data import DataLoader, Dataset

from ..data.pictures import decode_image
from ..failures import causes, first_line
from ..image_processing_vitae import ViTAEImageProcessor, channel_count, to_rgb, to_tensor


PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
PASSING |= {errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN}
Anything = TypeVar("Anything")


class Item(NamedTuple):
    """A picture to be read.

    Attributes:
        name: of its row.
        picture: a path or URL, the bytes of a file, or a picture as an image processor takes it.
        error: why there is none.
    """

    name: str
    picture: Any = None
    error: str | None = None


class Chunk(NamedTuple):
    """The pictures of a batch.

    Attributes:
        part: name of what their rows belong to.
        items: the pictures.
        is_last: whether the part ends with them.
    """

    part: str
    items: list[Item]
    is_last: bool


class Batch(NamedTuple):
    """What a worker made of a [`Chunk`].

    Attributes:
        part, is_last: of the chunk.
        names: of the rows.
        errors: why a picture could not be read, for each.
        pixel_values: `(B, channels, height, width)`, uint8, or float32 where a picture is not of 8 bits; zeros in the
            place of what could not be read, and `None` if nothing could.
        reading_s, decoding_s: seconds that the worker took.
    """

    part: str
    is_last: bool
    names: list[str]
    errors: list[str | None]
    pixel_values: torch.Tensor | None
    reading_s: float
    decoding_s: float


class PictureReader(Dataset[Batch]):
    """What the workers of a data loader run: the pixels of a [`Chunk`], neither rescaled nor normalised yet.

    Args:
        processor: which resizes and crops.
        draft: let JPEGs be decoded at a half, a quarter or an eighth of their size, as long as that is at least twice
            the size to which they are resized.
    """

    def __init__(self, processor: Any, draft: bool = False):
        self.processor = processor
        self.draft = draft
        # Then the processor's own way is to do what is done here, after checks that take longer.
        self.is_simple: bool = (
            type(processor) is ViTAEImageProcessor
            and processor.do_convert_rgb
            and channel_count(processor.image_mean, processor.image_std) == 3
        )

    def __getitem__(self, chunk: Chunk) -> Batch:
        pixels: list[torch.Tensor | None] = []
        errors: list[str | None] = []
        reading_s = decoding_s = 0.0
        for item in chunk.items:
            started = read = time.perf_counter()
            image, error = None, item.error
            try:
                if error is None:
                    content = contents(item)
                    read = time.perf_counter()
                    image = self.pixels_of(content, item.name)
            except Exception as failure:
                if is_passing(failure):
                    raise
                error = first_line(failure)
            pixels.append(image)
            errors.append(error)
            reading_s, decoding_s = reading_s + read - started, decoding_s + time.perf_counter() - read
        names = [item.name for item in chunk.items]
        return Batch(chunk.part, chunk.is_last, names, errors, stacked(pixels), reading_s, decoding_s)

    def pixels_of(self, picture: Any, name: str) -> torch.Tensor:
        if isinstance(picture, bytes):
            return decode_image({"bytes": picture, "path": name}, name, self.process)
        return self.process(picture)

    def process(self, picture: Any) -> torch.Tensor:
        processor = self.processor
        if self.draft and isinstance(picture, PIL.Image.Image):
            size, crop_pct = processor.size, getattr(processor, "crop_pct", 1.0)
            picture.draft(None, (int(2 * size["width"] / crop_pct), int(2 * size["height"] / crop_pct)))
        if self.is_simple and isinstance(picture, PIL.Image.Image):
            pixels = to_tensor(np.asarray(to_rgb(picture))).permute(2, 0, 1)  # channels stay last in memory: faster
            return processor.resize_and_crop(
                pixels, processor.size, processor.resample, processor.crop_pct
            ).contiguous()
        return processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]


def is_passing(error: BaseException) -> bool:
    """Whether it is an error of the machine, its storage or the network, and not the picture's fault: it may be over
    when the command runs again."""
    kinds = (ConnectionError, TimeoutError, httpx.HTTPError)
    return any(isinstance(cause, kinds) or getattr(cause, "errno", None) in PASSING for cause in causes(error))


def contents(item: Item) -> Any:
    """The bytes of a file, or a picture that is in memory.

    Raises:
        ValueError: the file cannot be read, or there is no picture; the message has the name.
    """
    picture = item.picture
    if picture is None:
        raise ValueError(f"{item.name} has no picture")
    if not isinstance(picture, (str, os.PathLike)):
        return picture
    try:
        if "://" in str(picture):
            with fsspec.open(str(picture), "rb") as file:
                return file.read()
        with open(picture, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"cannot read {item.name}: {error.strerror or error}") from error


def stacked(pixels: list[torch.Tensor | None]) -> torch.Tensor | None:
    """A batch of pictures, with zeros where there is none; `None` if there is none at all."""
    good = [image for image in pixels if image is not None]
    if not good:
        return None
    dtype = torch.uint8 if all(image.dtype == torch.uint8 for image in good) else torch.float32
    return torch.stack(
        [torch.zeros_like(good[0], dtype=dtype) if image is None else image.to(dtype) for image in pixels]
    )


def slices(things: Iterable[Anything], size: int) -> Iterator[list[Anything]]:
    """Lists of `size` successive things, the last one of those that are left."""
    iterator = iter(things)
    while found := list(islice(iterator, size)):
        yield found


def chunks(parts: Iterable[tuple[str, Iterable[Item]]], batch_size: int) -> Iterator[Chunk]:
    """The pictures of each part in batches; none has pictures of two parts."""
    for name, items in parts:
        batches = slices(items, batch_size)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            yield Chunk(name, batch, following is None)
            batch = following


def check_resizes(processor: Any) -> None:
    """See that pictures come out in one size.

    Raises:
        ValueError: the processor does not resize.
    """
    if not getattr(processor, "do_resize", True):
        raise ValueError("pictures must come out in one size: set `do_resize` in the image processor")


def read(
    processor: Any, batches: Iterable[Chunk], num_workers: int, pin_memory: bool = False, draft: bool = False
) -> Iterator[Batch]:
    """What `num_workers` processes, of one thread each, make of these batches, in order.

    Raises:
        ValueError: the processor does not resize.
        OSError: the storage fails, or a worker ended.
    """
    check_resizes(processor)
    loader = DataLoader(
        PictureReader(processor, draft),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=unchanged,
        pin_memory=pin_memory,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that reads pictures has ended: {first_line(error)}") from error


def unchanged(batch: Any) -> Any:
    return batch


def as_item(picture: Any, number: int) -> Item:
    """A picture that somebody hands over: a path, a URL, bytes, an undecoded image of a data set, or pixels."""
    if isinstance(picture, dict) and "bytes" in picture:
        return Item(picture.get("path") or f"picture {number}", picture["bytes"] or picture.get("path"))
    if isinstance(picture, (str, os.PathLike)):
        return Item(os.fspath(picture), os.fspath(picture))
    name = getattr(picture, "filename", "") or f"picture {number}"
    try:
        if isinstance(picture, PIL.Image.Image):
            picture.load()
        return Item(name, picture)
    except Exception as error:  # Pillow's readers raise errors of every kind
        return Item(name, None, f"cannot read {name}: {error}")
