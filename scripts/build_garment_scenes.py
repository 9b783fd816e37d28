# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A small data set with masks and boxes that ships: real garments put on rendered backgrounds.

    python scripts/build_garment_scenes.py --output examples/garment_scenes

Each scene has 2 to 5 Fashion-MNIST images from `examples/fashion_mnist_mini`, at random scales, places and tints,
painted one over the other on a coloured background. The pixels of an image that are not black are its garment. Scenes
for validation use garments of the test split. The same seed gives the same pixels.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from pycocotools import mask as coco_masks

from vitae_hf.failures import run_command


SOURCE = Path(__file__).parents[1] / "examples" / "fashion_mnist_mini"
SPLITS = {"train": "train", "validation": "test"}  # split of scenes -> split of garments
HEIGHT, WIDTH = 96, 128
THRESHOLD = 24  # a garment's pixels are brighter than this, of 255
MIN_VISIBLE = 0.25  # an object of which a smaller share is visible gets no box; its pixels stay in the mask


def resize(values: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BICUBIC))


def render_background(generator: np.random.Generator) -> np.ndarray:
    """A gradient of two colours under soft blotches, and stripes now and then: float (HEIGHT, WIDTH, 3) in 0 to 1."""
    first, second = generator.uniform(0.1, 0.9, (2, 3))
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    along = x * np.cos(angle) + y * np.sin(angle)
    share = (along - along.min()) / np.ptp(along)
    scene = first + share[..., None] * (second - first)
    blotches = generator.normal(size=(generator.integers(3, 13), generator.integers(4, 17))).astype(np.float32)
    scene = scene + generator.uniform(0, 0.08) * resize(blotches, WIDTH, HEIGHT)[..., None]
    if generator.random() < 0.4:
        stripes = np.sin(2 * np.pi * generator.uniform(3, 14) * along + generator.uniform(0, 6))
        scene = scene + generator.uniform(0.03, 0.15) * stripes[..., None]
    return scene


def place_garment(generator: np.random.Generator, garment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (HEIGHT, WIDTH, 3) and extent (HEIGHT, WIDTH) of one garment somewhere in the scene, mirrored or not."""
    side = int(generator.integers(30, 65))
    values = resize(garment[:, :: generator.choice([1, -1])], side, side)
    top, left = generator.integers(0, HEIGHT - side + 1), generator.integers(0, WIDTH - side + 1)
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    canvas[top : top + side, left : left + side] = values
    tint = generator.uniform(0.3, 1.0, 3)
    return tint * (0.15 + 0.85 * canvas[..., None] / 255), canvas > THRESHOLD


def render_scene(generator: np.random.Generator, garments: Dataset) -> dict:
    """One row: picture, mask (0 is background, any other number a class of garments), and its objects, each with a box
    `[x, y, width, height]`, a class and a mask of its own in COCO's run-length code."""
    scene = render_background(generator)
    instances = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes, areas = [0], [0]
    for index in generator.choice(len(garments), generator.integers(2, 6), replace=False).tolist():
        row = garments[index]
        colours, extent = place_garment(generator, np.asarray(row["image"]))
        scene[extent] = colours[extent]
        instances[extent] = len(classes)
        classes.append(row["label"] + 1)
        areas.append(int(extent.sum()))
    scene = scene + generator.normal(0, 0.01, scene.shape)
    boxes = {
        number: box(instances == number)
        for number in range(1, len(classes))
        if (instances == number).sum() >= MIN_VISIBLE * areas[number]
    }
    return {
        "image": encode(np.uint8(255 * scene.clip(0, 1)), "jpeg", quality=88),
        "mask": encode(np.array(classes, np.uint8)[instances], "png", optimize=True),
        "objects": {
            "bbox": list(boxes.values()),
            "category": [classes[number] for number in boxes],
            "segmentation": [run_lengths(instances == number) for number in boxes],
        },
    }


def box(extent: np.ndarray) -> list[int]:
    """Left, top, width and height, in pixels, of what is visible of an object."""
    rows, columns = np.flatnonzero(extent.any(1)), np.flatnonzero(extent.any(0))
    return [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def run_lengths(extent: np.ndarray) -> dict:
    """COCO's compressed run-length code of what is visible of an object."""
    code = coco_masks.encode(np.asfortranarray(extent, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def encode(pixels: np.ndarray, kind: str, **options) -> dict:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--scenes", type=int, nargs=2, metavar=("TRAIN", "VALIDATION"), default=(480, 80))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"seed": arguments.seed}
    for number, ((split, garment_split), scenes) in enumerate(zip(SPLITS.items(), arguments.scenes)):
        garments = load_dataset("parquet", data_files=str(SOURCE / f"{garment_split}-*.parquet"), split="train")
        names = ["background", *garments.features["label"].names]
        objects = {
            "bbox": List(List(Value("float32"), length=4)),
            "category": List(ClassLabel(names=names)),
            "segmentation": List({"size": List(Value("int32")), "counts": Value("string")}),
        }
        features = Features({"image": Image(), "mask": Image(), "objects": objects})
        generator = np.random.default_rng([arguments.seed, number])
        rows = [render_scene(generator, garments) for _ in range(scenes)]
        path = arguments.output / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
        record[split] = {"scenes": scenes, "bytes": path.stat().st_size}
    return record


if __name__ == "__main__":
    run_command(main)
