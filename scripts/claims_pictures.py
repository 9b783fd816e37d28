# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of `compare_claims.py`: garments in a black frame, and the same smaller, moved, turned and damaged."""

import hashlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional

from vitae_hf.data.sources import draw_by_class, load_labelled_images


SHARE_OF_PIECES = 0.1
"""The share of the training images on which networks without a piece are trained."""
GARMENT, FRAME = 32, 64
"""Sides in pixels of a garment and of the frame around it, as the networks see them in training."""
PATCH = 32
"""Largest side in pixels of what is one token in a last map."""
Labelled = tuple[torch.Tensor, torch.Tensor]
"""Grey images (N, 28, 28), uint8, and their labels (N,)."""


def tensors(split: datasets.Dataset) -> Labelled:
    images = [image.convert("L") for image in split.cast_column("image", datasets.Image())["image"]]
    if sizes := {image.size for image in images} - {(28, 28)}:
        raise ValueError(f"the comparison takes images of 28×28 pixels as Fashion-MNIST's, got one of {min(sizes)}")
    return torch.from_numpy(np.stack(images)), torch.tensor(split["label"])


@cache
def load(data: Path, held_out: int) -> tuple[Labelled, Labelled, Labelled]:
    """The training images, as many held out of them, whatever the seed of a run, and the test images."""
    splits = load_labelled_images(str(data))
    kept, rest = draw_by_class(splits["train"], held_out / len(splits["train"]), 0, "the held-out share")
    return tensors(rest), tensors(kept), tensors(splits["test"])


def digest(sets: Iterable[Labelled]) -> str:
    """What tells the images and labels of a comparison from others."""
    found = hashlib.sha256()
    for part in (part for images in sets for part in images):
        found.update(part.numpy())
    return found.hexdigest()


def share_of(images: Labelled, share: float, seed: int) -> Labelled:
    """A share of every class."""
    pictures, labels = images
    if share == 1:
        return images
    order = np.random.default_rng(seed).permutation(len(labels))
    ordered = labels.numpy()[order]
    each = [order[ordered == label] for label in np.unique(ordered)]
    chosen = np.concatenate([members[: max(1, round(share * len(members)))] for members in each])
    return pictures[chosen], labels[chosen]


def framed(images: torch.Tensor, garment: int = GARMENT, frame: int = FRAME) -> torch.Tensor:
    """Garments of a side in pixels in a frame: (N, 28, 28), uint8 -> (N, 1, frame, frame) from 0 to 1.

    Their middle is that of the frame, or, in a frame of another size than in training, as near to it as it can be at
    a corner of the networks' largest patches: there it was in training, and elsewhere they would see it moved.
    """
    garments = interpolate(images[:, None] / 255, (garment, garment), mode="bicubic", antialias=True).clamp(0, 1)
    before = PATCH * round(frame / 2 / PATCH) - garment // 2
    after = frame - garment - before
    return pad(garments, (before, after, before, after))


def shifted(images: torch.Tensor, pixels: int) -> torch.Tensor:
    """A quarter of the garments each moved right, down, left and up. They stay in the frame."""
    pictures = framed(images)
    moves = [(0, pixels), (pixels, 0), (0, -pixels), (-pixels, 0)]
    for index, move in enumerate(moves):
        pictures[index::4] = pictures[index::4].roll(move, (2, 3))
    return pictures


def rotated(images: torch.Tensor, degrees: int) -> torch.Tensor:
    """Every other garment turned right, the others left."""
    pictures = framed(images)
    for index, sign in enumerate((1, -1)):
        pictures[index::2] = functional.rotate(
            pictures[index::2], sign * degrees, functional.InterpolationMode.BILINEAR
        )
    return pictures


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    torch.manual_seed(0)  # the same noise for every network
    return functional.gaussian_noise(framed(images), sigma=sigma)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return functional.gaussian_blur(framed(images), [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def pale(images: torch.Tensor, contrast: float) -> torch.Tensor:
    return functional.adjust_contrast(framed(images), contrast)


def occluded(images: torch.Tensor, side: int) -> torch.Tensor:
    """A grey square somewhere on each garment."""
    pictures, places = framed(images), np.random.default_rng(0)
    first = (FRAME - GARMENT) // 2
    for picture in pictures:
        top, left = first + places.integers(0, GARMENT - side + 1, 2)
        functional.erase(picture, int(top), int(left), side, side, torch.tensor(0.5), inplace=True)
    return pictures


CHANGES: dict[str, tuple[Callable[..., torch.Tensor], tuple]] = {
    "scale": (lambda images, side: framed(images, side), (16, 20, 22, 26, 32, 38, 46, 54, 64)),
    "resolution": (lambda images, size: framed(images, size // 2, size), (48, 64, 80, 96, 112, 128)),
    "shift": (shifted, tuple(range(17))),
    "rotation": (rotated, (0, 10, 20, 30, 45, 60, 90)),
    "noise": (noisy, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "blur": (blurred, (0.5, 1.0, 2.0, 3.0, 4.0)),
    "contrast": (pale, (0.5, 0.3, 0.2, 0.1, 0.05)),
    "occlusion": (occluded, (6, 10, 14, 18, 22)),
}
"""Each change of the test images, and its strengths: sides in pixels of a garment or of a frame (with the garment half
as large), pixels, degrees, standard deviations of noise (grey levels from 0 to 1) and of blur (pixels), what is left of
the contrast, and the side of the square."""
DAMAGES = ("noise", "blur", "contrast", "occlusion")


def changed(images: torch.Tensor, change: str) -> dict[float, Callable[[], torch.Tensor]]:
    """For each strength of a change, what makes the pictures."""
    function, strengths = CHANGES[change]
    return {strength: partial(function, images, strength) for strength in strengths}
