# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures and their objects to tensors: augmented together for training, whole for evaluation."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...data.augmentation import ColourDistortion
from .objects import Objects


@dataclass
class BoxAugmentationArguments:
    """How to resize and augment pictures with boxes; the defaults are DETR's for COCO."""

    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width that every picture is stretched to, or one number for both; default: 640 for"
            " rt_detr, which needs one size; other detectors get pictures of their own shape, see short_sides."
        },
    )
    short_sides: list[int] = field(
        default_factory=lambda: list(range(480, 801, 32)),
        metadata={"help": "Shorter sides, in pixels, one of which is drawn for each picture; the largest evaluates."},
    )
    long_side: int = field(default=1333, metadata={"help": "The longer side has at most so many pixels."})
    crop_prob: float = field(
        default=0.5,
        metadata={
            "help": "Probability of a crop before the resizing: with image_size SSD's, which keeps objects by their"
            " overlap; else DETR's, 384 to 600 pixels of a picture whose shorter side is 400, 500 or 600, for sides of"
            " 800, and in proportion for others."
        },
    )
    zoom_out_prob: float = field(
        default=0.0,
        metadata={"help": "Probability that the picture becomes a part of a canvas up to four times as wide."},
    )
    flip_prob: float = field(default=0.5, metadata={"help": "Probability to mirror a picture and its objects."})
    distortion_prob: float = field(
        default=0.0, metadata={"help": "Probability of each change: of brightness, contrast, saturation and hue."}
    )

    def __post_init__(self) -> None:
        if self.image_size is not None and (len(self.image_size) not in (1, 2) or min(self.image_size) < 1):
            raise ValueError(f"`image_size` must be one or two numbers above 0, got {self.image_size}")
        if min(self.short_sides, default=0) < 1 or self.long_side < 1:
            raise ValueError(
                f"`short_sides` and `long_side` must be above 0, got {self.short_sides} and {self.long_side}"
            )
        for name in ("crop_prob", "zoom_out_prob", "flip_prob", "distortion_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1, got {getattr(self, name)}")

    @property
    def processor_size(self) -> dict[str, int]:
        """The size of the image processor, with which the model is evaluated and used."""
        if self.image_size is None:
            return {"shortest_edge": max(self.short_sides), "longest_edge": self.long_side}
        return {"height": self.image_size[0], "width": self.image_size[-1]}


class CropOfRandomSize(v2.Transform):
    """A random rectangle of a picture and its objects, each side between two bounds where the picture is that large.

    Source: Carion et al. 2020, DETR.
    """

    def __init__(self, least: int, most: int):
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        sides = [int(torch.randint(min(self.least, side), min(self.most, side) + 1, ())) for side in (height, width)]
        top, left = (int(torch.randint(0, whole - part + 1, ())) for whole, part in zip((height, width), sides))
        return {"top": top, "left": left, "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class ObjectTransform:
    """The training transform: a picture and its objects to normalised pixels `(3, height, width)` and labels.

    Objects of which a crop has left nothing are gone.
    """

    def __init__(self, arguments: BoxAugmentationArguments):
        flip = v2.RandomHorizontalFlip(arguments.flip_prob)
        distort = ColourDistortion(p=arguments.distortion_prob)
        mean_colour = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)
        zoom_out = v2.RandomZoomOut({tv_tensors.Image: mean_colour, "others": 0}, p=arguments.zoom_out_prob)
        cropped = v2.RandomApply([self._crop(arguments)], arguments.crop_prob)
        self.steps = v2.Compose([flip, distort, zoom_out, cropped, self._resize(arguments)])
        self.finish = v2.Compose(
            [
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
                v2.ToPureTensor(),
            ]
        )

    @staticmethod
    def _crop(arguments: BoxAugmentationArguments) -> v2.Transform:
        if arguments.image_size is not None:
            return v2.RandomIoUCrop()
        largest = max(arguments.short_sides)
        sides = [round(largest * share) for share in (0.5, 0.625, 0.75)]
        longest = arguments.long_side
        return v2.Compose(
            [
                v2.RandomShortestSize(sides, max_size=longest),
                CropOfRandomSize(round(0.48 * largest), round(0.75 * largest)),
            ]
        )

    @staticmethod
    def _resize(arguments: BoxAugmentationArguments) -> v2.Transform:
        if arguments.image_size is not None:
            return v2.Resize([arguments.image_size[0], arguments.image_size[-1]])
        return v2.RandomShortestSize(arguments.short_sides, max_size=arguments.long_side)

    def __call__(self, picture: PIL.Image.Image, objects: Objects) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        height, width = picture.size[::-1]
        sample: dict[str, Any] = {
            "pixel_values": tv_tensors.Image(v2.functional.pil_to_tensor(picture)),
            "boxes": tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=(height, width)),
            "class_labels": torch.from_numpy(objects.labels),
        }
        if objects.masks is not None:
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(objects.pixels(height, width)))
        labels = self.finish(keep_visible(self.steps(sample)))
        return labels.pop("pixel_values"), labels


def keep_visible(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample without objects of whose box or mask a crop, which clips them, has left no pixel."""
    boxes = sample["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    if "masks" in sample:
        kept &= sample["masks"].flatten(1).any(1).bool()
    return {key: value if key == "pixel_values" else value[kept] for key, value in sample.items()}


def evaluation_transform(processor: Any) -> partial[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The transform of an evaluation: the picture as the image processor prepares it, and the `size` that it had."""
    return partial(_prepare, processor)


def _prepare(processor: Any, picture: PIL.Image.Image, _: Objects) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return processor(picture, return_tensors="pt").pixel_values[0], {"size": torch.tensor(picture.size[::-1])}
