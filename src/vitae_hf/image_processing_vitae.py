# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' evaluation transform, for torchvision and for PIL.

A picture is resized until it covers `size / crop_pct`, with an antialiased bicubic filter. Its centre is cut out,
scaled to [0, 1], and normalised with the mean and standard deviation of ImageNet.
"""

import math
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from shutil import copyfile
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torchvision_available, logging


logger = logging.get_logger(__name__)

Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)
Statistics = float | Sequence[float] | None

MISSING_VALUES = "not all values of the picture are finite: put others in place of those that are missing"
MOST_RESCALED = 1.5  # filters go beyond 1 at edges
MAX_ASPECT_RATIO = 20
"""A picture that is longer than this many times its width loses its ends before it is resized."""
SMALLEST_STD = 1e-6
MAX_VALUES: int = 3 * 2**23
"""The most values (pixels times channels) that `size / crop_pct` may have: 2896×2896 pixels of three channels."""
# For folders that load without this package: the class for each backend.
AUTO_MAP: dict[str, dict[str, str]] = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_vitae.ViTAEImageProcessor",
        "pil": "image_processing_vitae.ViTAEImageProcessorPil",
    }
}


def read_image(source: str | os.PathLike[str]) -> PIL.Image.Image:
    """Read an image from a path, URL or base64 string.

    Raises:
        ValueError: the file is damaged or no image. The message names the file.
    """
    if not os.path.isfile(source):
        return load_image(str(source))
    try:
        with PIL.Image.open(source) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's readers raise errors of every kind
        raise ValueError(f"cannot read the image {os.fspath(source)!r}: {error}") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture upright and into 8-bit RGB. 16-bit grey is scaled to 8 bits; Pillow would clip it.

    Raises:
        ValueError: it has no pixels, or its floating-point values are not finite, go from 0 to 1 or are mostly beyond 8
            bits.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if not all(image.size):
        raise ValueError(f"the picture has no pixels: it is {image.size[0]}×{image.size[1]}")
    if image.mode == "F":
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError(MISSING_VALUES)
        is_cut = np.mean((pixels < 0) | (pixels > 255)) > 0.1  # filters go beyond the bounds at edges
        if is_cut or 0 < pixels.max() <= 1:
            bounds = f"{pixels.min():g} to {pixels.max():g}"
            raise ValueError(f"its values are floating-point numbers from {bounds}: save it with 8 or 16 bits")
    elif image.mode.startswith("I"):
        pixels = np.asarray(image)
        highest = pixels.max()
        if image.mode.startswith("I;16") or highest > 255:
            if 0 < highest < 4096:
                logger.warning_once(
                    f"A picture of 16 bits has no value above {highest}, so that it is nearly black: scale such"
                    " pictures to 65535."
                )
            image = PIL.Image.fromarray((pixels.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a grey picture of any mode upright and into 8-bit grey. A picture with colours becomes RGB."""
    image = to_rgb(image)
    pixels = np.asarray(image)
    return image.getchannel(0) if (pixels == pixels[..., :1]).all() else image


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """The pixels as a tensor that shares their memory. What torch cannot share is copied, such as mirrored views."""
    return torch.from_numpy(np.require(pixels, pixels.dtype.newbyteorder("="), ["C", "W"]))


def to_pixels(image: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Integers as 8-bit pixels, if `num_channels` is 1 or 3. 16-bit integers are scaled.

    For other numbers of channels, and if values are beyond 8 bits, integers become floats of the same value. Images in
    uint8 or floating point are returned as they are.
    """
    if image.dtype == torch.uint8 or image.is_floating_point():
        return image
    integers = image.to(torch.int32)
    if num_channels in (1, 3):
        if image.dtype == torch.uint16:
            return (integers >> 8).to(torch.uint8)
        if integers.min() >= 0 and integers.max() <= 255:
            return integers.to(torch.uint8)
    return integers.float()


def infer_channel_axis(image: torch.Tensor, num_channels: int) -> ChannelDimension:
    """Find the axis of an image, first or last, that has the wanted number of channels.

    If three channels are wanted, one or four will do as well, since they can be converted.
    """
    first, last = image.shape[0], image.shape[-1]
    for counts in ((1, 3), (1, 3, 4)) if num_channels == 3 else ((num_channels,),):
        if first in counts or last in counts:
            return infer_channel_dimension_format(image, counts)  # type: ignore[arg-type]  # it reads shapes only
    return ChannelDimension.FIRST if first <= last else ChannelDimension.LAST


def resized_height_width(height: int, width: int, size: SizeDict, crop_pct: float) -> tuple[int, int]:
    """The size at which an image just covers `size / crop_pct`. One side fits exactly, the other is rounded down."""
    target_height, target_width = int(size["height"] / crop_pct), int(size["width"] / crop_pct)
    if target_height * width >= target_width * height:  # the height fits exactly
        return target_height, int(target_height * width / height)
    return int(target_width * height / width), target_width


def center_box(height: int, width: int, size: SizeDict) -> tuple[slice, slice]:
    """Rows and columns of the centre crop. As in the authors' code, halves are rounded to even numbers."""
    top, left = int(round((height - size["height"]) / 2)), int(round((width - size["width"]) / 2))
    return slice(top, top + size["height"]), slice(left, left + size["width"])


def without_far_ends(image: Pixels, size: SizeDict) -> Pixels:
    """Cut the ends off an image `(..., height, width)` that is more than `MAX_ASPECT_RATIO` times as long as wide, or
    more than twice the proportion of the output.

    They would be cropped after resizing anyway, and resizing a line of 10,000×1 pixels would take gigabytes.
    """
    height, width = image.shape[-2:]
    proportion = max(size["height"], size["width"]) / min(size["height"], size["width"])
    longest = math.ceil(max(MAX_ASPECT_RATIO, 2 * proportion) * min(height, width))
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image[..., top : top + min(height, longest), left : left + min(width, longest)]


def channel_count(image_mean: Statistics, image_std: Statistics) -> int:
    """How many channels pictures have that are normalised by these statistics.

    A sequence has one number for each channel. If both statistics are single numbers, pictures have three channels.

    Raises:
        ValueError: there are not as many means as standard deviations.
    """
    means, deviations = np.asarray(image_mean).shape, np.asarray(image_std).shape
    counts = {shape[0] for shape in (means, deviations) if shape}
    if len(counts) > 1:
        raise ValueError(
            "`image_mean` and `image_std` must have a number for each channel, got"
            f" {means[0]} and {deviations[0]} numbers"
        )
    return counts.pop() if counts else 3


def check_statistics(image_mean: Statistics, image_std: Statistics) -> None:
    """Raise an error unless pixels can be normalised with these numbers.

    Raises:
        ValueError: a number is not finite, or a standard deviation is too small.
    """
    means, deviations = (np.asarray(values, dtype=np.float64) for values in (image_mean, image_std))
    if not (means.size and np.isfinite(means).all()):
        raise ValueError(f"`image_mean` must be finite numbers, got {str(image_mean)[:100]}.")
    if not (deviations.size and np.isfinite(deviations).all() and deviations.min() >= SMALLEST_STD):
        raise ValueError(f"`image_std` must be finite numbers of at least {SMALLEST_STD}, got {str(image_std)[:100]}.")


class ViTAEImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    crop_pct (`float`, *optional*, defaults to `self.crop_pct`):
        Share of the resized picture's side that the centre crop keeps. With 1.0 only what exceeds `size` is cut off.
    """

    crop_pct: float


class _ViTAEProcessing(BaseImageProcessor):
    """What both backends share: default settings, reading of pictures, checks, and saving."""

    valid_kwargs = ViTAEImageProcessorKwargs
    resize: Callable[..., Any]  # the backend's
    filters: tuple[int, ...] = (0, 1, 2, 3)  # Pillow's numbers for nearest, Lanczos, bilinear and bicubic
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size: dict[str, int] = {"height": 224, "width": 224}
    crop_pct: float = 0.9
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def fetch_images(self, images: Any) -> Any:
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("expected at least one picture, got an empty list")
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, os.PathLike)):
            return read_image(images)
        if getattr(images, "ndim", 0) == 4 and not len(images):
            raise ValueError(f"expected at least one picture, got an array of shape {tuple(images.shape)}")
        if is_valid_image(images):
            return images[None] if getattr(images, "ndim", 3) == 2 else images  # grey arrays have no channel axis
        raise TypeError(f"expected a picture (PIL, array, tensor, path or URL), or a list of them, got {type(images)}")

    def process_image(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        image_mean: Statistics = None,
        image_std: Statistics = None,
        rescale_factor: float | None = None,
        **kwargs: Any,
    ) -> np.ndarray | torch.Tensor:
        num_channels = channel_count(image_mean, image_std)
        if isinstance(image, PIL.Image.Image):
            if do_convert_rgb:
                image = {1: to_grey, 3: to_rgb}.get(num_channels, PIL.ImageOps.exif_transpose)(image)
            image, input_data_format = np.atleast_3d(np.asarray(image)), ChannelDimension.LAST
        image = to_pixels(image if torch.is_tensor(image) else to_tensor(image), num_channels)
        if image.is_floating_point() and not image.isfinite().all():
            raise ValueError(MISSING_VALUES)
        if do_rescale and image.dtype != torch.uint8 and image.numel() and image.min() >= 0 and image.max() <= 1:
            logger.warning_once(
                "It looks like you are trying to rescale already rescaled images. If the input images have pixel values"
                " between 0 and 1, set `do_rescale=False` to avoid rescaling them again."
            )
        if do_rescale and rescale_factor and image.numel() and image.max() * rescale_factor > MOST_RESCALED:
            logger.warning_once(
                f"Pixels up to {image.max():g} are multiplied by {rescale_factor:.3g}, which gives more than 1: scale"
                " pictures to 255, or set `rescale_factor`, or `do_rescale=False` if means are in their unit."
            )
        if not image.numel():
            raise ValueError(f"the picture has no pixels: its shape is {tuple(image.shape)}")
        input_data_format = input_data_format or infer_channel_axis(image, num_channels)
        pixels = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)
        if do_convert_rgb and num_channels == 3 and len(pixels) in (1, 4):
            pixels = pixels[[0, 0, 0]] if len(pixels) == 1 else pixels[:3]  # grey, or alpha to drop
        if len(pixels) != num_channels and (do_convert_rgb or do_normalize):
            raise ValueError(
                "the picture must have as many channels as `image_mean` and `image_std` have numbers,"
                f" {num_channels}, got {len(pixels)}"
            )
        return pixels

    def _validate_preprocess_kwargs(self, size: SizeDict, crop_pct: float, **kwargs: Any) -> None:
        if kwargs.get("do_center_crop") is not None or kwargs.get("crop_size") is not None:
            raise ValueError("the crop follows from `size` and `crop_pct`: leave `do_center_crop` and `crop_size` out")
        super()._validate_preprocess_kwargs(size=size, **kwargs)
        if kwargs.get("do_resize") and not (size.height and size.width):
            raise ValueError(
                f"`size` must have 'height' and 'width', the size of the output in pixels, got {dict(size)}."
            )
        if not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
            raise ValueError(f"`crop_pct` must be above 0 and at most 1, got {crop_pct}.")
        self._validate_numbers(size, crop_pct, **kwargs)

    def _validate_numbers(self, size: SizeDict, crop_pct: float, **kwargs: Any) -> None:
        """Check the settings that decide about memory and numbers, since a processor's file may come from anybody."""
        mean, std = kwargs.get("image_mean"), kwargs.get("image_std")
        factor: Any = kwargs.get("rescale_factor")
        resample, channels = kwargs.get("resample"), channel_count(mean, std)
        if kwargs.get("do_rescale") and not 0 < factor < math.inf:
            raise ValueError(f"`rescale_factor` must be a positive number, got {factor}.")
        if kwargs.get("do_normalize"):
            check_statistics(mean, std)
        if not kwargs.get("do_resize"):
            return
        is_torchvisions = isinstance(resample, Enum) and not isinstance(resample, int)
        if not is_torchvisions and resample not in self.filters:
            raise ValueError(f"`resample` must be one of the filters {self.filters}, got {resample!r}.")
        are_whole = all(isinstance(side, int) and side >= 1 for side in (size.height, size.width))
        if not are_whole or channels * size["height"] * size["width"] > MAX_VALUES * crop_pct**2:
            raise ValueError(
                f"`size` over `crop_pct` must be whole pixels and at most {MAX_VALUES:,} values, got"
                f" {size.height}×{size.width} pixels of {channels} channels at a `crop_pct` of {crop_pct}."
            )

    def validate(self) -> None:
        """Raise an error unless pictures can be processed with the current settings.

        Raises:
            ValueError: a setting has a value that cannot be used. The message names the setting.
        """
        names = ("size", "crop_pct", "do_resize", "do_rescale", "do_normalize", "image_mean", "image_std", "resample")
        settings: dict[str, Any] = {name: getattr(self, name, None) for name in (*names, "rescale_factor", "crop_size")}
        self._validate_preprocess_kwargs(**settings)

    def resize_and_crop(self, image: Pixels, size: SizeDict, resample: Enum | int | None, crop_pct: float) -> Pixels:
        """Pixels `(..., height, width)` as `preprocess` resizes and crops them, before it rescales and normalises."""
        image = without_far_ends(image, size)
        height, width = resized_height_width(image.shape[-2], image.shape[-1], size, crop_pct)
        image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
        rows, columns = center_box(height, width, size)
        return image[..., rows, columns]

    def to_dict(self) -> dict[str, Any]:
        """The settings, and where `AutoImageProcessor` finds this class, unless a user's class has been registered."""
        settings = super().to_dict()
        return settings if self._auto_class else {**settings, "auto_map": AUTO_MAP}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save `preprocessor_config.json` and this file, so that the folder loads without this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copyfile(__file__, Path(save_directory) / Path(__file__).name)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Without the code: `push_to_hub=True` uploads what is newer, and the code was copied just before."""
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if not name.endswith(".py")}


class ViTAEImageProcessor(_ViTAEProcessing, TorchvisionBackend):
    r"""
    The authors' evaluation transform on torchvision: batched, and on the GPU when called with `device="cuda"`.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`):
            Size of the output in pixels; an integer means a square. At most 2896×2896 when divided by `crop_pct`.
        crop_pct (`float`, *optional*, defaults to 0.9):
            Share of the resized picture's side that the centre crop keeps.
        resample (`PIL.Image.Resampling`, *optional*, defaults to bicubic):
            Filter for resizing, which is always antialiased.
        image_mean, image_std (`list[float]`, *optional*, default to ImageNet's):
            Mean and standard deviation of each channel. Pictures must have as many channels as there are numbers.
        do_resize, do_rescale, do_normalize (`bool`, *optional*, default to `True`):
            Resize and crop; divide by 255; apply `image_mean` and `image_std`.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Turn pictures upright and convert them. If there are three means, they become 8-bit RGB: pictures of any
            mode of PIL, arrays of one channel, and arrays of four channels, whose last one (alpha) is dropped. If there
            is one mean, grey pictures of any mode become 8-bit grey. For other numbers of means nothing is converted,
            and integers of more than 8 bits keep their values.

    Calling it with pictures (PIL, arrays, tensors, paths, URLs, in any mix of sizes) gives a `BatchFeature` with
    `pixel_values` `(B, channels, height, width)`.

    Raises:
        ImportError: torchvision is not installed; `AutoImageProcessor` then takes [`ViTAEImageProcessorPil`] by itself.
        ValueError: an image file is damaged, an argument is out of range, or a picture has another number of channels.

    Source: the authors' evaluation at 224², crop ratio 0.9. On uint8 torchvision and Pillow differ by at most 1.
    """

    def __init__(self, **kwargs: Unpack[ViTAEImageProcessorKwargs]):
        if not is_torchvision_available():
            raise ImportError(
                "ViTAEImageProcessor needs torchvision: install it with `pip install torchvision`, or use"
                " ViTAEImageProcessorPil or AutoImageProcessor, which work without it."
            )
        super().__init__(**kwargs)

    def _preprocess(
        self,
        images: Any,
        do_resize: bool,
        size: SizeDict,
        resample: Enum | int | None,
        crop_pct: float,
        disable_grouping: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_resize:
            grouped, index = group_images_by_shape(images, disable_grouping=disable_grouping)
            grouped = {shape: self.resize_and_crop(stack, size, resample, crop_pct) for shape, stack in grouped.items()}
            images = reorder_images(grouped, index)
        return super()._preprocess(
            images, do_resize=False, size=size, resample=resample, disable_grouping=disable_grouping, **kwargs
        )


class ViTAEImageProcessorPil(_ViTAEProcessing, PilBackend):
    """The same transform on Pillow, with exactly the authors' pixels. See [`ViTAEImageProcessor`]."""

    filters: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # also box and Hamming, which torchvision lacks

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray | torch.Tensor:
        if torch.is_tensor(image):  # of any device and dtype, as the other backend takes them
            image = image.detach().cpu()
            image = image.float() if image.dtype == torch.bfloat16 else image
        return super().process_image(image, *args, **kwargs)

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Enum | int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """As in the base class. Images that Pillow has no mode for (other channels, floats) are resized by channel."""
        if image.dtype == np.uint8 and len(image) in (1, 3):
            return super().resize(image, size, resample=resample, **kwargs)
        if resample is not None and not isinstance(resample, int):  # one of torchvision's filters
            resample = PIL.Image.Resampling[resample.name]
        image, shape = image if image.dtype == np.uint8 else image.astype(np.float32), (size["width"], size["height"])
        return np.stack([np.asarray(PIL.Image.fromarray(channel).resize(shape, resample)) for channel in image])

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        crop_pct: float,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_resize:
            images = [self.resize_and_crop(image, size, resample, crop_pct) for image in images]
        return super()._preprocess(images, do_resize=False, size=size, resample=resample, **kwargs)


__all__ = ["ViTAEImageProcessor", "ViTAEImageProcessorPil"]
