# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' training augmentation, with timm's functions: pictures on the CPU, then batches on the device.

Workers crop, flip and RandAugment pictures, and send uint8 tensors, a quarter of the size of floats. On the device a
batch is normalised, partly erased, and mixed with itself, which turns labels into soft targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


@dataclass
class AugmentationArguments:
    """How strongly to augment; the defaults are the authors' supervised recipe."""

    auto_augment: str | None = field(
        default="rand-m9-mstd0.5-inc1",
        metadata={"help": "timm's name of a policy, or none. With a policy timm applies no color_jitter."},
    )
    color_jitter: float = field(
        default=0.4, metadata={"help": "Change of brightness, contrast and saturation, at most."}
    )
    min_crop_scale: float = field(
        default=0.08, metadata={"help": "Smallest share of the picture that a random crop keeps."}
    )
    flip_prob: float = field(default=0.5, metadata={"help": "Probability to mirror a picture."})
    interpolation: str = field(
        default="random", metadata={"help": "bilinear, bicubic, or random: one of the two for each picture."}
    )
    erasing_prob: float = field(default=0.25, metadata={"help": "Probability to fill a rectangle with noise."})
    mixup_alpha: float = field(
        default=0.8,
        metadata={"help": "Each batch is mixed by mixup or by CutMix, as often by either; 0: not by mixup."},
    )
    cutmix_alpha: float = field(default=1.0, metadata={"help": "As mixup_alpha; 0: not by CutMix."})
    label_smoothing: float = field(default=0.1, metadata={"help": "What of a label is shared out to all classes."})

    def __post_init__(self) -> None:
        if self.auto_augment in ("none", ""):
            self.auto_augment = None
        if self.interpolation not in ("random", "bilinear", "bicubic"):
            raise ValueError(f"`interpolation` must be bilinear, bicubic or random, got {self.interpolation!r}")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"`min_crop_scale` must be above 0 and at most 1, got {self.min_crop_scale}")
        for name in ("flip_prob", "erasing_prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1, got {getattr(self, name)}")
        for name in ("color_jitter", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if self.auto_augment:
            try:
                create_transform(1, is_training=True, auto_augment=self.auto_augment)
            except Exception as error:  # timm's parser raises errors of many types
                raise ValueError(f"`auto_augment` must be a policy of timm's, got {self.auto_augment!r}") from error


def training_transform(
    size: int | tuple[int, int], arguments: AugmentationArguments
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """The transform of a worker: RGB picture of any size -> uint8 `(3, height, width)`."""
    transform = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # timm's word for leaving pixels as uint8
        scale=(arguments.min_crop_scale, 1.0),
        hflip=arguments.flip_prob,
        color_jitter=arguments.color_jitter,
        auto_augment=arguments.auto_augment,
        interpolation=arguments.interpolation,
    )
    for step in transform.transforms:
        for operation in getattr(step, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: PIL.Image.Image, bits_to_keep: int, **_: Any) -> PIL.Image.Image:
    """timm's posterize. At 0 bits, its strongest, Pillow made the picture black until release 13 and then refused."""
    return PIL.ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else PIL.Image.new(image.mode, image.size)


class ColourDistortion(v2.RandomPhotometricDistort):
    """mmsegmentation's distortion, of brightness, contrast, saturation and hue; torchvision's swaps channels too."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class DeviceAugmentation:
    """Normalises, erases and mixes a training batch on the device.

    Calling it with `pixel_values` uint8 `(B, 3, height, width)` and `labels` `(B,)` gives normalised float32 pixels and
    soft targets `(B, num_labels)` whose rows sum to one.

    The first image is mixed with the last, the second with the last but one, and so on. The last image of an odd batch
    is not mixed.

    Source: Zhong et al. 2017, "Random Erasing"; Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix".
    """

    def __init__(
        self,
        num_labels: int,
        arguments: AugmentationArguments,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self.num_labels = num_labels
        self.arguments = arguments
        self._statistics = cache(partial(_statistics, image_mean, image_std))
        self.mixup: Mixup | None = None
        if arguments.mixup_alpha > 0 or arguments.cutmix_alpha > 0:
            self.mixup = Mixup(
                arguments.mixup_alpha,
                arguments.cutmix_alpha,
                label_smoothing=arguments.label_smoothing,
                num_classes=num_labels,
            )

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self._statistics(pixel_values.device)
        pixel_values = (pixel_values.float() - mean) / std
        erase = RandomErasing(self.arguments.erasing_prob, mode="pixel", device=pixel_values.device)
        pixel_values = erase(pixel_values)
        targets = torch.nn.functional.one_hot(labels, self.num_labels).float()
        smoothing = self.arguments.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / self.num_labels
        even = len(pixel_values) // 2 * 2
        if self.mixup is not None and even:
            pixel_values[:even], targets[:even] = self.mixup(pixel_values[:even], labels[:even])
        return pixel_values, targets


class DeviceNormalization:
    """Normalises the uint8 pixels `(B, 3, height, width)` of a training batch without labels on the device."""

    def __init__(
        self,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self._statistics = cache(partial(_statistics, image_mean, image_std))

    def __call__(self, pixel_values: torch.Tensor, labels: None = None) -> tuple[torch.Tensor, None]:
        mean, std = self._statistics(pixel_values.device)
        return (pixel_values.float() - mean) / std, labels


def _statistics(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Mean and standard deviation of pixels from 0 to 255, `(1, 3, 1, 1)`."""
    return tuple(torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (mean, std))


def soft_target_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy for soft targets `(B, classes)` or labels `(B,)`, as the Trainer's `compute_loss_func`.

    Labels of -100 are ignored.

    Args:
        outputs: a classifier's, with `logits` `(B, classes)`.
        labels: as above.
        num_items_in_batch: images of the whole accumulated batch, by which the sum is divided so that the losses of its
            parts add up to its mean; none: the mean of this batch.
    """
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(outputs.logits.float(), labels)
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum") / num_items_in_batch
