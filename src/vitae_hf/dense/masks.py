# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures with masks through `datasets`, checked as they are read, and their augmentation by torchvision."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.pictures import decode_image
from ..data.samples import PictureDataset, seeded
from ..data.sources import load_any, read_class_names
from ..image_processing_vitae import to_rgb


IGNORED_CLASS = 255
"""Value of a mask where nothing is learned and nothing counts."""
IMAGE_COLUMNS = ("image", "images", "img", "pixel_values")
MASK_COLUMNS = ("mask", "annotation", "label", "labels", "segmentation", "segmentation_mask", "semantic_mask")


def load_masked_images(source: str, name: str | None = None) -> datasets.DatasetDict:
    """Load a data set by Hub name or local folder: parquet files, or pictures with a `metadata.jsonl` that has
    `file_name` and `mask_file_name`.

    Returns:
        Its splits, with the undecoded columns `image` and `mask`, and `objects` if it has boxes.

    Raises:
        ValueError: there is not one column of pictures and one of masks; the message lists the columns.
    """
    data = load_any(source, name)
    columns = find_mask_columns(next(iter(data.values())).features, source)
    if "objects" in data[next(iter(data))].features:
        columns["objects"] = "objects"
    data = data.select_columns(list(columns))
    data = data.rename_columns({column: role for column, role in columns.items() if column != role})
    for role in ("image", "mask"):
        data = data.cast_column(role, datasets.Image(decode=False))
    return data


def find_mask_columns(features: datasets.Features, source: str) -> dict[str, str]:
    """Which column of pictures is the `image` and which the `mask`, by name.

    Raises:
        ValueError: there is not one of each.
    """
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found = {}
    for role, known in (("image", IMAGE_COLUMNS), ("mask", MASK_COLUMNS)):
        matches = [column for column in pictures if column in known]
        if len(matches) != 1:
            raise ValueError(
                f"{source} must have one column of pictures for the {role}s, called one of {', '.join(known)}; it has"
                f" {matches or 'none'} among the columns {list(features)}, of which {pictures} are pictures"
            )
        found[matches[0]] = role
    return found


def mask_class_names(data: datasets.DatasetDict, file: Path | None = None) -> dict[int, str]:
    """Names of the classes by the value of the mask: the lines of a file, else those of the `category` of `objects`.

    Raises:
        ValueError: there is neither, or a line is empty or there twice.
    """
    if file is not None:
        return dict(enumerate(read_class_names(file)))
    category = getattr(next(iter(data.values())).features.get("objects"), "get", {}.get)("category")
    names = getattr(getattr(category, "feature", None), "names", None)
    if names is None:
        raise ValueError("masks are numbers without names: give a file with the name of a class on each line")
    return dict(enumerate(names))


def read_mask(image: dict | None, name: str, num_labels: int, reduce_labels: bool = False) -> np.ndarray:
    """A mask `(height, width)` in uint8 with a class at each pixel, or 255 for none.

    Args:
        image: undecoded picture of one channel, or with a palette, whose indices then count.
        name: of the row, for messages.
        num_labels: classes there are.
        reduce_labels: whether 0 means "none of the classes", as in ADE20K, and the first class is 1.

    Raises:
        ValueError: it is missing or damaged, has several channels, or a value that is no class.
    """
    mask = decode_image(image, f"the mask of {name}", _single_channel)
    if reduce_labels:
        mask = np.where((mask == 0) | (mask == IGNORED_CLASS), IGNORED_CLASS, mask - 1)
    wrong = mask[(mask != IGNORED_CLASS) & (mask >= num_labels)]
    if wrong.size:
        raise ValueError(
            f"the mask of {name} has the value {wrong.max()}, and {wrong.size} pixels in all that are no class: there"
            f" are {num_labels} classes, counted from 0, and {IGNORED_CLASS} for what is ignored"
        )
    return mask.astype(np.uint8)


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    if (orientation := picture.getexif().get(PIL.ExifTags.Base.Orientation, 1)) != 1:
        raise ValueError(f"its EXIF orientation is {orientation}, which its mask has not: save the picture upright")
    return to_rgb(picture)


def _single_channel(picture: PIL.Image.Image) -> np.ndarray:
    if len(picture.getbands()) != 1:
        raise ValueError(f"a mask has one channel, a class at each pixel; this one is {picture.mode}")
    return np.array(picture).astype(np.int64)


class SegmentationDataset(PictureDataset, Dataset):
    """One split as `{"pixel_values", "labels", "names"}` for the Trainer; `labels` is the mask `(height, width)`.

    Args:
        split: as [`load_masked_images`] gives it.
        transform: of an RGB picture and its mask, uint8 `(height, width)`.
        num_labels, reduce_labels: as in [`read_mask`].
        seed: see [`PictureDataset`].

    Raises:
        ValueError: more than 255 classes; on reading a row: as [`read_mask`], or picture and mask differ in size.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Callable[[PIL.Image.Image, np.ndarray], tuple[torch.Tensor, torch.Tensor]],
        num_labels: int,
        reduce_labels: bool = False,
        seed: int | None = None,
    ):
        super().__init__(transform, seed=seed, num_labels=num_labels)
        if num_labels > IGNORED_CLASS:
            raise ValueError(f"there can be {IGNORED_CLASS} classes at most, got {num_labels}")
        self.split, self.reduce_labels = split, reduce_labels

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> tuple[PIL.Image.Image, np.ndarray, str]:
        """Picture, mask and name, for messages, of a row."""
        row = self.split[index]
        name = (row["image"] or {}).get("path") or f"row {index}"
        picture = decode_image(row["image"], name, _upright)
        mask = read_mask(row["mask"], name, self.num_labels, self.reduce_labels)
        if picture.size != mask.shape[::-1]:
            raise ValueError(
                f"{name} has {picture.size[0]}×{picture.size[1]} pixels, but its mask {mask.shape[1]}×{mask.shape[0]}"
            )
        return picture, mask, name

    def check(self, rows: int = 32) -> None:
        """Read rows from all over the split, so that data of the wrong kind are found before training begins."""
        if not len(self):
            raise ValueError("the split has no rows")
        for index in np.unique(np.linspace(0, len(self) - 1, rows).astype(int)):
            self.read(int(index))

    def __getitem__(self, index: int) -> dict:
        picture, mask, name = self.read(index)
        with seeded(self.seed, self.epoch, index):
            pixel_values, labels = self.transform(picture, mask)
        return {"pixel_values": pixel_values, "labels": labels, "names": name}


def collate_masks(samples: list[dict]) -> dict:
    """A batch: `pixel_values` `(B, 3, H, W)`, `labels` `(B, height, width)`.

    Raises:
        ValueError: the pictures differ in size, as they do in most evaluations.
    """
    for key in ("pixel_values", "labels"):
        sizes = sorted({tuple(sample[key].shape[-2:]) for sample in samples})
        if len(sizes) > 1:
            raise ValueError(f"a batch has pictures or masks of one size, got {sizes}: evaluate one picture at a time")
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "names": [sample["names"] for sample in samples],
    }


@dataclass
class MaskAugmentationArguments:
    """How to augment pictures and masks together; the defaults are mmsegmentation's for ADE20K."""

    short_side: int = 512
    """Shorter side, in pixels, that pictures are resized to: in evaluation, and in training before the random scale."""
    crop_size: int = 512
    """Side, in pixels, of the square that one trains on; smaller pictures are filled up, and the mask ignores that."""
    min_scale: float = 0.5
    max_scale: float = 2.0
    max_class_share: float = 0.75
    """A crop with more than this share of one class is drawn again, up to ten times."""
    flip_prob: float = 0.5
    distortion_prob: float = 0.5
    """Of each change of brightness, contrast, saturation and hue."""

    def __post_init__(self):
        for name in ("short_side", "crop_size", "min_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}")
        if self.max_scale < self.min_scale:
            raise ValueError(f"`max_scale` must be at least `min_scale`, {self.min_scale}, got {self.max_scale}")
        for name in ("max_class_share", "flip_prob", "distortion_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1, got {getattr(self, name)}")


class VariedCrop(v2.RandomCrop):
    """torchvision's random crop of a picture and a mask, drawn up to ten times until no class has too much of it.

    What is ignored does not count as part of the crop.

    Args:
        size: side in pixels.
        max_class_share: largest share of the crop that a class may have.
        fill: colour, 0 to 255, of what is added to smaller pictures.

    Source: mmsegmentation's `cat_max_ratio`.
    """

    def __init__(self, size: int, max_class_share: float, fill: tuple[int, ...]):
        fill = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORED_CLASS}
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.max_class_share = max_class_share

    def forward(self, picture: tv_tensors.Image, mask: tv_tensors.Mask):
        for _ in range(10):
            cropped = super().forward(picture, mask)
            counts = torch.bincount(cropped[1].flatten(), minlength=IGNORED_CLASS)[:IGNORED_CLASS]
            if counts.count_nonzero() > 1 and counts.max() <= self.max_class_share * counts.sum():
                break
        return cropped


class ColourDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue as mmsegmentation distorts them: torchvision would swap channels too."""

    def make_params(self, flat_inputs: list) -> dict:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def segmentation_transform(arguments: MaskAugmentationArguments) -> Callable:
    """What a worker does to a picture and its mask: float pixels `(3, crop, crop)`, normalised, and int64 classes."""
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


def _transform_both(steps: Callable, picture: PIL.Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return steps(tv_tensors.Image(v2.functional.pil_to_tensor(picture)), tv_tensors.Mask(torch.from_numpy(mask)))


def evaluation_sample(processor, picture: PIL.Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What an image processor makes of the picture, and the mask at its own size."""
    return processor(picture, return_tensors="pt").pixel_values[0], torch.from_numpy(mask).long()
