# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Writes Fashion-MNIST as parquet files that `datasets` reads: all of it, or some images of each class.

    python scripts/build_fashion_mnist.py IDX_FOLDER --output data/fashion_mnist          # `make data-fashion-mnist`
    python scripts/build_fashion_mnist.py IDX_FOLDER --output examples/fashion_mnist_mini --per_class 600 100

The folder holds the four `*-ubyte.gz` files as published, for example those of Debian's package dataset-fashion-mnist.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from vitae_hf.failures import run_command


CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path, header_bytes: int) -> np.ndarray:
    """The values of a gzipped IDX file (unsigned bytes), without its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header_bytes)


def read_split(folder: Path, split: str, per_class: int | None, seed: int) -> Dataset:
    """The images and labels of a split, or `per_class` of each class."""
    images = read_idx(folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz", 8)
    indices = np.arange(len(labels)) if per_class is None else draw(labels, per_class, seed)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    rows = {"image": [encode_png(images[index]) for index in indices], "label": labels[indices].tolist()}
    return Dataset.from_dict(rows, features=features)


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Shuffled indices of `per_class` images of every class."""
    generator = np.random.default_rng(seed)
    by_class = [generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(10)]
    return generator.permutation(np.concatenate(by_class))


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "png", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the four .gz files are")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--per_class", type=int, nargs=2, metavar=("TRAIN", "TEST"), default=(None, None))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"seed": arguments.seed}
    for split, per_class in zip(PREFIXES, arguments.per_class):
        data = read_split(arguments.folder, split, per_class, arguments.seed)
        path = arguments.output / f"{split}-00000-of-00001.parquet"
        data.to_parquet(path)
        record[split] = {"images": len(data), "bytes": path.stat().st_size}
    return record


if __name__ == "__main__":
    run_command(main)
