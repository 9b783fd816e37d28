# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures and masks to tensors: augmented together for training, whole for evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...data.augmentation import ColourDistortion
from .data import IGNORED_CLASS


@dataclass
class MaskAugmentationArguments:
    """How to augment pictures and masks together; the defaults are mmsegmentation's for ADE20K."""

    short_side: int = field(
        default=512,
        metadata={
            "help": "Shorter side, in pixels, of the resized pictures; in training a random scale multiplies it."
        },
    )
    crop_size: int = field(
        default=512,
        metadata={
            "help": "Side, in pixels, of the square crop for training; smaller pictures are padded and ignored there."
        },
    )
    min_scale: float = field(default=0.5, metadata={"help": "The smallest random scale."})
    max_scale: float = field(default=2.0, metadata={"help": "The largest random scale."})
    max_class_share: float = field(
        default=0.75,
        metadata={"help": "A crop with more than this share of one class is drawn again, up to ten times."},
    )
    flip_prob: float = field(default=0.5, metadata={"help": "Probability to mirror a picture and its mask."})
    distortion_prob: float = field(
        default=0.5, metadata={"help": "Probability of each change: of brightness, contrast, saturation and hue."}
    )

    def __post_init__(self) -> None:
        for name in ("short_side", "crop_size", "min_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}")
        if self.max_scale < self.min_scale:
            raise ValueError(f"`max_scale` must be at least `min_scale`, {self.min_scale}, got {self.max_scale}")
        for name in ("max_class_share", "flip_prob", "distortion_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1, got {getattr(self, name)}")


class VariedCrop(v2.RandomCrop):
    """torchvision's random crop of a picture and a mask, drawn up to ten times while one class fills most of it.

    Ignored pixels do not count as part of the crop.

    Args:
        size: side in pixels.
        max_class_share: largest share of the crop that a class may have.
        fill: colour, 0 to 255, of the padding of smaller pictures.

    Source: mmsegmentation's `cat_max_ratio`.
    """

    def __init__(self, size: int, max_class_share: float, fill: tuple[int, ...]):
        fills = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORED_CLASS}
        super().__init__(size, pad_if_needed=True, fill=fills)
        self.max_class_share = max_class_share

    def forward(self, picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(10):
            cropped = super().forward(picture, mask)
            counts = torch.bincount(cropped[1].flatten(), minlength=IGNORED_CLASS)[:IGNORED_CLASS]
            if counts.count_nonzero() > 1 and counts.max() <= self.max_class_share * counts.sum():
                break
        return cropped


def segmentation_transform(
    arguments: MaskAugmentationArguments,
) -> Callable[[PIL.Image.Image, np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """The training transform: picture and mask -> normalised pixels `(3, crop, crop)`, int64 classes `(crop, crop)`."""
    short_sides = (round(arguments.min_scale * arguments.short_side), round(arguments.max_scale * arguments.short_side))
    mean_colour = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)
    steps = v2.Compose(
        [
            v2.RandomShortestSize(range(short_sides[0], short_sides[1] + 1)),
            VariedCrop(arguments.crop_size, arguments.max_class_share, mean_colour),
            v2.RandomHorizontalFlip(arguments.flip_prob),
            ColourDistortion(p=arguments.distortion_prob),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            v2.ToPureTensor(),
        ]
    )
    return partial(_transform_both, steps)


def _transform_both(
    steps: Callable[..., Any], picture: PIL.Image.Image, mask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    return steps(tv_tensors.Image(v2.functional.pil_to_tensor(picture)), tv_tensors.Mask(torch.from_numpy(mask)))


def evaluation_sample(processor: Any, picture: PIL.Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The transform of an evaluation: the picture as the image processor prepares it, and the mask at its own size."""
    return processor(picture, return_tensors="pt").pixel_values[0], torch.from_numpy(mask).long()
