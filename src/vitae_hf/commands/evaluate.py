# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How good is a trained classifier on labelled images, overall and class by class?

    vitae evaluate --model_name_or_path outputs/mine --dataset FOLDER
    vitae evaluate --model_name_or_path vitae-nano-fashion --dataset examples/fashion_mnist_mini   # in a checkout

`vitae-nano-fashion` is the small model that the package carries; a folder or a name on the Hub works as well.
`--dataset` is as for `vitae train`. Size and crop are those of the saved image processor unless given. Every picture of
the split is evaluated; with `--on_bad_sample skip`, those that cannot be read are left out and counted. Writes
`eval_metrics.json` (all figures, accuracy by class, confusion matrix), `confusion_matrix.png` and
`per_class_accuracy.png`.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..class_names import read_class_names
from ..data.samples import ImageDataset, evaluation_pixels
from ..data.sources import EVALUATION_SPLITS, find_data_files, load_labelled_images, pick_split
from ..environment import environment
from ..evaluation.scores import (
    align_labels,
    all_figures,
    as_json,
    draw_confusion,
    draw_per_class,
    predict,
    read_real_labels,
)
from ..failures import about, device
from ..files import write_text
from ..loading import label_names, load_trained
from . import add_image_size, command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae evaluate", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name of a classifier")
    parser.add_argument("--dataset", required=True, help="Hub name or local folder of labelled images")
    parser.add_argument("--dataset_name", help="its configuration, if several")
    parser.add_argument("--split", help="default: validation, else test")
    parser.add_argument("--image_column_name", help="the column of images, if there are several")
    parser.add_argument("--label_column_name", help="the column of labels, if there are several")
    parser.add_argument(
        "--class_names",
        type=Path,
        help="for labels that are numbers: a text file with a class on each line, or imagenet-1k",
    )
    add_image_size(parser)
    parser.add_argument("--crop_pct", type=float, help="share of the resized side that the centre crop keeps")
    parser.add_argument("--batch_size", type=int, default=64, help="default: 64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument(
        "--real_labels", type=Path, help="real.json of ImageNet's validation set, for the ReaL accuracy"
    )
    parser.add_argument(
        "--on_bad_sample", choices=["error", "skip"], default="error", help="an unreadable picture; default: error"
    )
    parser.add_argument("--output", type=Path, help="folder to write; default: outputs/evaluation-MODEL")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        arguments.output = Path("outputs") / f"evaluation-{Path(arguments.model_name_or_path).resolve().name}"
    return arguments


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """All figures, and how they were measured."""
    source = arguments.dataset, arguments.dataset_name
    chosen = pick_split(find_data_files(*source), *([arguments.split] if arguments.split else EVALUATION_SPLITS))
    of_numbers = None if arguments.class_names is None else read_class_names(arguments.class_names)
    columns = {"image_column": arguments.image_column_name, "label_column": arguments.label_column_name}
    split = load_labelled_images(*source, [chosen], of_numbers, **columns)[chosen]  # the others may be large
    with about(arguments.model_name_or_path):
        size = arguments.image_size, arguments.crop_pct
        model, processor = load_trained(arguments.model_name_or_path, *size, dtype=arguments.dtype)
    model.to(arguments.device)
    classes = align_labels(split.features["label"].names, label_names(model.config))
    real = None if arguments.real_labels is None else read_real_labels(arguments.real_labels, split)
    data = ImageDataset(split, partial(evaluation_pixels, processor), arguments.on_bad_sample, drop_bad=True)
    started = time.perf_counter()
    scores, rows = predict(model, data, arguments.batch_size, arguments.num_workers)
    seconds = time.perf_counter() - started
    names = dict(enumerate(label_names(model.config).values())) | dict(
        zip(classes.tolist(), split.features["label"].names)
    )
    figures = all_figures(
        scores,
        classes[split.select(rows)["label"][:]],
        [names[index] for index in range(len(names))],
        None if real is None else [classes[real[row]].tolist() for row in rows],
    )
    circumstances = {
        "model": arguments.model_name_or_path,
        "dataset": arguments.dataset,
        **{name: getattr(arguments, name) for name in ("dataset_name", "image_column_name", "label_column_name")},
        "split": str(split.split),
        "skipped": data.skipped,
        "image_size": [processor.size.height, processor.size.width],
        "crop_pct": getattr(processor, "crop_pct", None),
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "images_per_s": round(len(data) / seconds, 1),
        **environment(arguments.device),
    }
    return figures, circumstances


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures, circumstances = evaluate(arguments)
    write_text(as_json({**circumstances, **figures}), arguments.output / "eval_metrics.json")
    draw_confusion(figures).savefig(arguments.output / "confusion_matrix.png", dpi=150)
    draw_per_class(figures).savefig(arguments.output / "per_class_accuracy.png", dpi=150)
    shown = {name: value for name, value in figures.items() if not isinstance(value, (dict, list))}
    shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in shown.items()}
    return {"output": str(arguments.output), **shown, **circumstances}
