# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How was `examples/fashion_mnist_mini` made? Draws it by class from the full Fashion-MNIST files.

    python scripts/build_fashion_mnist_mini.py FOLDER_WITH_IDX_GZ_FILES

The folder holds the four `*-ubyte.gz` files as published, for example those of Debian's package dataset-fashion-mnist.
"""

import argparse
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


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
PER_CLASS = {"train": 600, "test": 100}
OUTPUT = Path(__file__).parents[1] / "examples" / "fashion_mnist_mini"


def read_idx(path: Path, header_bytes: int) -> np.ndarray:
    """The values of a gzipped IDX file (unsigned bytes), without its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header_bytes)


def draw(folder: Path, split: str, seed: int) -> Dataset:
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
    generator = np.random.default_rng(seed)
    by_class = [
        generator.choice(np.flatnonzero(labels == label), PER_CLASS[split], replace=False) for label in range(10)
    ]
    indices = generator.permutation(np.concatenate(by_class))
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    rows = {"image": [encode_png(images[index]) for index in indices], "label": labels[indices].tolist()}
    return Dataset.from_dict(rows, features=features)


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "png", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the four .gz files are")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    record = {"seed": arguments.seed}
    for split in PER_CLASS:
        path = OUTPUT / f"{split}-00000-of-00001.parquet"
        draw(arguments.folder, split, arguments.seed).to_parquet(path)
        record[split] = {"images": 10 * PER_CLASS[split], "bytes": path.stat().st_size}
    return record


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
