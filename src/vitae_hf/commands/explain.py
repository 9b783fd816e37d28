# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What did a classifier see in my pictures, and which branch of its cells saw it?

    vitae explain vitae-nano-fashion                 # the two pictures that the package carries
    vitae explain outputs/mine cat.jpg dog.jpg

Draws for each image the scores, Grad-CAM, where attention looks, and how much attention and convolution add to each
token, cell by cell. Prints a line of JSON for each image, then one for all. If an image cannot be read, the command
names it, explains the others, and ends with status 1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..class_names import distinct
from ..data.pictures import open_picture
from ..environment import environment
from ..evaluation.explanation import Explanation, class_of, draw, explain
from ..failures import about, device
from ..files import PICTURES
from ..loading import label_names, load_trained
from . import add_image_size, command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae explain", __doc__)
    parser.add_argument("model_name_or_path", help="folder or Hub name of a classifier")
    parser.add_argument(
        "images", nargs="*", help=f"files; default: {' and '.join(path.name for path in PICTURES)} of the package"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/explanations"),
        help="folder to write; default: outputs/explanations",
    )
    parser.add_argument("--target", help="label to explain by Grad-CAM; default: the likeliest")
    add_image_size(parser)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    arguments.images = arguments.images or list(map(str, PICTURES))
    return arguments


def picture_paths(images: list[str], folder: Path) -> list[Path]:
    """The picture to write for each image, of the same name. If several images have one name, they are numbered.

    Names that differ in case alone count as one, as some file systems see them.
    """
    stems = distinct((Path(image).stem for image in images), separator="-", key=str.casefold)
    return [folder / f"{stem}.png" for stem in stems]


def refuse_to_overwrite(images: list[str], pictures: list[Path]) -> None:
    """See that no picture is written over one that is to be explained.

    Raises:
        ValueError: one would be.
    """
    files = {identity(Path(image)): image for image in images if Path(image).exists()}
    for picture in pictures:
        if picture.exists() and (image := files.get(identity(picture))) is not None:
            raise ValueError(f"{image} would be written over by what explains it: choose another --output")


def identity(path: Path) -> tuple[int, int]:
    """Device and number of a file, which are the same under all its names."""
    status = path.stat()
    return status.st_dev, status.st_ino


def summary(image: str, picture: Path, explanation: Explanation) -> dict[str, Any]:
    """The line that is printed for an image. `attention_percent` is the mean share of attention in each cell."""
    shares = zip(explanation.cells, explanation.attention_share)
    return {
        "image": image,
        "picture": str(picture),
        "labels": [{**entry, "score": round(entry["score"], 4)} for entry in explanation.labels],
        "target": explanation.target_label,
        "attention_percent": {cell: round(100 * float(share.mean()), 1) for cell, share in shares},
        "seconds": round(explanation.seconds, 3),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    pictures = picture_paths(arguments.images, arguments.output)
    refuse_to_overwrite(arguments.images, pictures)
    with about(arguments.model_name_or_path):
        model, processor = load_trained(arguments.model_name_or_path, arguments.image_size, dtype=arguments.dtype)
    model.to(arguments.device)
    target = None if arguments.target is None else class_of(arguments.target, label_names(model.config))
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for image, picture in zip(arguments.images, pictures):
        try:
            pixels = open_picture(image)
        except (OSError, ValueError) as error:
            print(f"error: {image}: {error}", file=sys.stderr)
            failed.append(image)
            continue
        explanation = explain(model, processor, pixels, target)
        draw(explanation).savefig(picture, dpi=110)
        print(json.dumps(summary(image, picture, explanation)))
    return {
        "model": arguments.model_name_or_path,
        "output": str(arguments.output),
        "images": len(arguments.images) - len(failed),
        "failed": failed,
        **environment(arguments.device),
    }


def status(record: dict[str, Any]) -> int:
    return 1 if record["failed"] else 0
