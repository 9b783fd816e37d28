# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Decodes the pictures in the rows of a data set. Every error names the file, or the row if there is no file."""

import os
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from huggingface_hub.utils import httpx

from ..failures import first_line
from ..image_processing_vitae import read_image, to_rgb


def open_picture(name: str) -> PIL.Image.Image:
    """The picture of a file or URL that somebody typed.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        OSError, ValueError: it cannot be read.
    """
    if not os.path.isfile(name) and not name.startswith(("http://", "https://")):
        raise FileNotFoundError(
            "it is a folder: name the pictures in it" if os.path.isdir(name) else "there is no such file"
        )
    try:
        return read_image(name)
    except httpx.HTTPError as error:  # which is no OSError
        raise OSError(f"no picture came from there: {first_line(error)}") from error


def decode(row: dict[str, Any], num_labels: int | None = None, name: str = "a row") -> PIL.Image.Image:
    """The upright RGB picture of a row.

    Args:
        row: with an undecoded `image`, a dict of `bytes` and `path`, and maybe a `label`.
        num_labels: how many classes there are; default: labels are not compared with it.
        name: of the row, for messages about a picture without a path.

    Raises:
        ValueError: the picture is missing or damaged, or there is a `label` that is empty, text, or no class; the
            message has the file, or the name of the row.
    """
    label, where = row.get("label", 0), origin(row["image"], name)
    if isinstance(label, str):
        raise ValueError(f"{where} has label {label!r}, which is none of the classes")
    if label is None or label < 0:
        raise ValueError(f"{where} has no label")
    if num_labels is not None and label >= num_labels:
        raise ValueError(f"{where} has label {label}, but there are {num_labels} classes, counted from 0")
    return decode_image(row["image"], name)


def origin(image: dict[str, Any] | None, name: str) -> str:
    """Where an undecoded image is from: its file, or the name of its row.

    Raises:
        ValueError: there is no image.
    """
    image = image or {}
    where = image.get("path") or name
    if not image.get("bytes") and not image.get("path"):
        raise ValueError(f"{where} has no picture")
    return where


def decode_image(image: dict[str, Any] | None, name: str, convert: Callable[[PIL.Image.Image], Any] = to_rgb) -> Any:
    """Decode an image and convert it.

    Raises:
        ValueError: it is missing or damaged; the message has the file, or the name of the row.
    """
    image, where = image or {}, origin(image, name)
    source = BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    try:
        with PIL.Image.open(source) as picture:
            return convert(picture)
    except Exception as error:  # Pillow's readers raise errors of every kind
        said = str(error).replace(repr(source), repr(where))  # Pillow shows bytes by their address
        raise ValueError(f"cannot read {where}: {said}") from error


def unturned(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in RGB, for annotations that are about its pixels as they are stored.

    Raises:
        ValueError: its EXIF data turn it.
    """
    if (orientation := picture.getexif().get(PIL.ExifTags.Base.Orientation, 1)) != 1:
        raise ValueError(
            f"its EXIF orientation is {orientation}, which its annotation has not: save the picture upright"
        )
    return to_rgb(picture)


def denormalised(pixel_values: torch.Tensor, image_mean: list[float], image_std: list[float]) -> torch.Tensor:
    """Pixels `(B, C, height, width)` before their normalisation, float32 on the CPU."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (image_mean, image_std))
    return pixel_values.float().cpu() * std + mean


def as_pictures(pixel_values: torch.Tensor, image_mean: list[float], image_std: list[float]) -> np.ndarray:
    """Normalised pixels `(B, C, height, width)` as pictures again, uint8 `(B, height, width, C)`; NaN becomes grey."""
    pixels = denormalised(pixel_values, image_mean, image_std)
    return (pixels.nan_to_num(0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
