# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What is on my pictures? Writes labels and features of any number of pictures, a row for each.

    vitae predict FOLDER --model vitae-nano-fashion --output outputs/labels
    vitae predict 'shards/*.tar' --model outputs/mine --output outputs/features --embeddings float16

A SOURCE is a picture, a folder (all pictures below it), a pattern, a parquet or WebDataset shard, or the name of a data
set on the Hub. The rows are in `part-*.parquet`, with the columns path, label, score, labels and scores (the best
first), error (why a picture could not be read), and embedding. Models without a classifier give embeddings alone. The
same command goes on after whatever has stopped it. Under torchrun, processes share the pictures out.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..deployment.inference import prepare_for_inference
from ..environment import environment, has_bfloat16
from ..failures import about, device
from ..loading import fingerprint, load_trained
from ..messages import listed
from ..prediction.dealing import Dealing
from ..prediction.listing import Listing
from ..prediction.parts import PART_ROWS, Parts
from ..prediction.rows import Predictor, usable_cores
from ..prediction.run import Run
from . import add_image_size, command_parser


logger = logging.get_logger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae predict", __doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="pictures, folders, patterns, shards, Hub names")
    parser.add_argument("--model", required=True, help="folder or Hub name of a model")
    parser.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote there")
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet", help="default: parquet")
    parser.add_argument("--dataset_name", help="which configuration of a data set on the Hub, if there are several")
    parser.add_argument("--split", help="which split of a data set on the Hub; default: all")
    parser.add_argument("--image_column_name", help="the column of pictures in parquet files, if there are several")
    parser.add_argument("--top_k", type=int, default=5, help="labels in a row; default: 5")
    parser.add_argument("--embeddings", choices=["float16", "float32"], help="add what the classifier reads")
    add_image_size(parser)
    parser.add_argument("--crop_pct", type=float, help="share of the resized side that the centre crop keeps")
    parser.add_argument("--batch_size", type=int, help="default: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--num_workers", type=int, help="processes that read pictures; default: by the cores")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model; default: bfloat16 where the device computes with it, else float32",
    )
    parser.add_argument("--device", type=device, default=default_device())
    parser.add_argument("--rows_per_part", type=int, default=PART_ROWS, help=f"default: {PART_ROWS}")
    parser.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a lower scale, which changes pixels"
    )
    arguments = parser.parse_args(argv)
    for name in ("top_k", "batch_size", "rows_per_part"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.num_workers is not None and arguments.num_workers < 0:
        parser.error(f"--num_workers must be at least 0, got {arguments.num_workers}")
    arguments.rank, arguments.world_size = (int(os.environ.get(*pair)) for pair in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if arguments.overwrite and arguments.world_size > 1:
        parser.error("--overwrite goes with one process only: others could lose what they have written")
    return arguments


def default_device() -> str:
    """A GPU for each process of a machine, if it has any."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def default_dtype(device: str) -> str:
    """bfloat16 where the device multiplies in it, else float32."""
    return "bfloat16" if has_bfloat16(device) else "float32"


def settings_of(arguments: argparse.Namespace, model: PreTrainedModel, predictor: Predictor) -> dict[str, Any]:
    """What decides about the rows; a run only goes on with one of the same settings."""
    processor = predictor.processor
    return {
        "model": arguments.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": fingerprint(model),
        "image_size": [processor.size["height"], processor.size["width"]],
        "crop_pct": getattr(processor, "crop_pct", None),
        **{name: getattr(processor, name) for name in ("image_mean", "image_std")},
        "dtype": arguments.dtype,
        "sources": arguments.sources,
        **{name: getattr(arguments, name) for name in ("dataset_name", "split", "image_column_name")},
        "top_k": arguments.top_k,
        "embeddings": predictor.embeddings,
        "format": arguments.format,
        "rows_per_part": arguments.rows_per_part,
        "draft": arguments.draft,
        "version": __version__,
        "labels": predictor.labels,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    arguments.dtype = arguments.dtype or default_dtype(arguments.device)
    chosen = arguments.image_column_name, arguments.dataset_name, arguments.split
    listing = Listing(arguments.sources, arguments.output, *chosen)
    listing.check()
    options = {"revision": arguments.revision} if arguments.revision else {}
    with about(arguments.model):
        size = arguments.image_size, arguments.crop_pct
        model, processor = load_trained(arguments.model, *size, headless=True, **options)
    predictor = Predictor(model, processor, arguments.top_k, arguments.embeddings)
    parts = Parts(arguments.output, arguments.format, arguments.rows_per_part, predictor.embeddings)
    settings = settings_of(arguments, model, predictor)
    model.to(arguments.device)
    prepare_for_inference(model, getattr(torch, arguments.dtype))
    predictor.try_out()  # what cannot run must not cost the rows of an earlier run
    parts.begin(settings, arguments.overwrite)
    run = Run(predictor, Dealing(listing, parts, arguments.rank, arguments.world_size), parts)
    workers = usable_cores() if arguments.num_workers is None else arguments.num_workers
    is_cpu = model.device.type == "cpu"
    batch_size = arguments.batch_size or (32 if is_cpu else 128)
    figures = run(batch_size, workers, usable_cores() if is_cpu else 2, arguments.draft)
    if listing.num_left_out:
        logger.warning("left out %d files that are no pictures: %s", listing.num_left_out, listed(listing.left_out))
    if run.errors == run.pictures > 0 and arguments.world_size == 1:
        raise ValueError(f"none of {run.pictures} pictures can be read: {run.first_error}")
    return {
        "model": arguments.model,
        "output": str(arguments.output),
        **figures,
        "dtype": arguments.dtype,
        "batch_size": batch_size,
        **environment(arguments.device),
    }
