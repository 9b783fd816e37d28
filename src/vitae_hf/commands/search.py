# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which pictures of a folder are most like this one?

    vitae predict pictures --model vitae-nano-fashion --embeddings float16 --output outputs/features
    vitae search outputs/features cat.jpg
    vitae search outputs/features cat.jpg dog.jpg --top_k 20 | jq .path

Embeds the pictures with the model, size and image processor that made the folder, and finds the embeddings with the
highest cosine. Prints a line of JSON for each neighbour, the best first, then one for all, and draws `search.png`: each
picture, its neighbours, their scores and paths. If a picture cannot be read, the command names it, searches for the
others, and ends with status 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel

from ..data.pictures import open_picture
from ..environment import environment
from ..failures import device
from ..prediction.embeddings import read_record
from ..prediction.neighbours import Neighbour, draw_sheet, embed, load_recorded, nearest
from . import command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae search", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `vitae predict --embeddings` wrote")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files or URLs to find the like of")
    parser.add_argument("--top_k", type=int, default=10, help="neighbours of each picture; default: 10")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file of the drawing; default: DIR/search.png")
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1:
        parser.error(f"--top_k must be at least 1, got {arguments.top_k}")
    if arguments.output is None:
        arguments.output = arguments.folder / "search.png"
    return arguments


def embed_pictures(
    names: list[str], model: PreTrainedModel, processor: Any
) -> tuple[dict[str, PIL.Image.Image], list[np.ndarray]]:
    """The pictures that can be read, by name, and their embeddings; the others are named on stderr."""
    pictures, embeddings = {}, []
    for name in names:
        try:
            picture = open_picture(name)
            embeddings.append(embed(model, processor, picture))
            pictures[name] = picture
        except (OSError, ValueError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
    return pictures, embeddings


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    record = read_record(arguments.folder)
    model, processor = load_recorded(record, arguments.device)
    pictures, embeddings = embed_pictures(arguments.pictures, model, processor)
    found: list[list[Neighbour]] = []
    seconds = 0.0
    if pictures:
        started = time.perf_counter()
        found = nearest(arguments.folder, np.stack(embeddings), arguments.top_k)
        seconds = time.perf_counter() - started
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(pictures, found, record.get("sources", [])).savefig(arguments.output, dpi=110)
    for query, neighbours in zip(pictures, found):
        for rank, neighbour in enumerate(neighbours, 1):
            row = {"query": query, "rank": rank, **neighbour._asdict(), "score": round(neighbour.score, 6)}
            print(json.dumps(row))
    return {
        "folder": str(arguments.folder),
        "model": record["model"],
        "output": str(arguments.output) if pictures else None,
        "pictures": len(pictures),
        "failed": [name for name in arguments.pictures if name not in pictures],
        "search_seconds": round(seconds, 3),
        **environment(arguments.device),
    }


def status(record: dict[str, Any]) -> int:
    return 1 if record["failed"] else 0
