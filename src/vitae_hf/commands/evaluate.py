# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How good is a trained classifier on labelled images, or a segmenter on masks, overall and class by class?

    vitae evaluate --model_name_or_path outputs/mine --dataset FOLDER
    vitae evaluate --model_name_or_path vitae-nano-fashion --dataset examples/fashion_mnist_mini   # in a checkout
    vitae evaluate --model_name_or_path outputs/loveda --dataset FOLDER --window_size 512 --window_stride 384

`vitae-nano-fashion` is the small model that the package carries; a folder or a name on the Hub works as well.
`--dataset` is as for `vitae train`. Size and crop are those of the saved image processor unless given. Every picture of
the split is evaluated; with `--on_bad_sample skip`, those that cannot be read are left out and counted. Writes
`eval_metrics.json` (all figures, accuracy by class, confusion matrix), `confusion_matrix.png` and
`per_class_accuracy.png`.

A segmenter takes the data of `vitae segment`, and is measured by the mean IoU of all pixels at the size of the masks.
Its image processor says how large it sees a picture, unless `--short_side` does; with `--window_size`, it sees the
picture at its own size, in windows that overlap. `overlays.png` shows some of them.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..class_names import read_class_names
from ..data.samples import ImageDataset, evaluation_pixels
from ..data.sources import EVALUATION_SPLITS, find_data_files, load_labelled_images, pick_split
from ..dense.segmentation.data import SegmentationDataset, load_masked_images, mask_class_names, unchanged
from ..dense.segmentation.evaluation import overlays, segmentation_figures
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
from ..evaluation.windows import Windows
from ..failures import about, device
from ..files import find_model, write_text
from ..loading import check_source, in_proportion, label_names, load_processor, load_trained, saved_architecture
from ..messages import listed
from . import add_image_size, command_parser


OF_CLASSIFIERS = {
    **dict.fromkeys(("image_column_name", "label_column_name", "image_size", "crop_pct", "real_labels")),
    "batch_size": 64,
    "on_bad_sample": "error",
}
OF_SEGMENTERS = {
    **dict.fromkeys(("short_side", "window_size", "window_stride", "ignored_class")),
    "reduce_labels": False,
}
"""Arguments that go with one kind of model alone, and their defaults."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae evaluate", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name of a classifier or a segmenter")
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
    parser.add_argument("--batch_size", type=int, default=OF_CLASSIFIERS["batch_size"], help="default: 64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument(
        "--real_labels", type=Path, help="real.json of ImageNet's validation set, for the ReaL accuracy"
    )
    parser.add_argument(
        "--on_bad_sample", choices=["error", "skip"], default="error", help="an unreadable picture; default: error"
    )
    parser.add_argument("--short_side", type=int, help="segmenters: shorter side of the resized pictures, in pixels")
    parser.add_argument("--window_size", type=int, help="segmenters: side of the windows over a picture, in pixels")
    parser.add_argument(
        "--window_stride", type=int, help="pixels from one window to the next; default: 3/4 of the size"
    )
    parser.add_argument("--reduce_labels", action="store_true", help="0 in a mask is no class, and 1 the first")
    parser.add_argument("--ignored_class", type=int, help="a class in masks that does not count")
    parser.add_argument("--output", type=Path, help="folder to write; default: outputs/evaluation-MODEL")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        arguments.output = Path("outputs") / f"evaluation-{Path(arguments.model_name_or_path).resolve().name}"
    return arguments


def is_segmenter(arguments: argparse.Namespace) -> bool:
    """Whether the model gives a class for each pixel.

    Raises:
        ValueError: an argument was given that does not go with its kind.
    """
    with about(arguments.model_name_or_path):
        source = find_model(arguments.model_name_or_path)
        check_source(source)
        found = saved_architecture(source).endswith("ForSemanticSegmentation")
    others = OF_CLASSIFIERS if found else OF_SEGMENTERS
    if given := [f"--{name}" for name, default in others.items() if getattr(arguments, name) != default]:
        kind = "a segmenter" if found else "a classifier"
        raise ValueError(f"{listed(given)} does not go with {arguments.model_name_or_path}, which is {kind}")
    if arguments.window_stride is not None and arguments.window_size is None:
        raise ValueError("--window_stride takes a --window_size too")
    return found


Evaluation = tuple[dict[str, Any], dict[str, Any], dict[str, Figure]]
"""Figures, how they were measured, and pictures by the names of their files."""


def evaluate_segmenter(arguments: argparse.Namespace, chosen: str) -> Evaluation:
    """The evaluation of a segmenter on a split."""
    splits = load_masked_images(arguments.dataset, arguments.dataset_name)
    size, stride, short_side = arguments.window_size, arguments.window_stride, arguments.short_side
    windows = None if size is None else Windows(size, max(1, 3 * size // 4) if stride is None else stride)
    with about(arguments.model_name_or_path):
        model, processor = load_trained(arguments.model_name_or_path, dtype=arguments.dtype, dense=True)
        options: dict[str, Any] = {} if short_side is None else {"size": in_proportion(short_side)}
        if windows is not None and short_side is None:
            options["do_resize"] = False
        processor = load_processor(find_model(arguments.model_name_or_path), None, None, model.config, **options)
    model.to(arguments.device)
    names = label_names(model.config)
    given = list(mask_class_names(splits, arguments.class_names, names).values())
    reduce_labels = arguments.reduce_labels or getattr(processor, "do_reduce_labels", False)
    shared = reduce_labels, None, arguments.ignored_class, align_labels(given, names)
    data = SegmentationDataset(splits[chosen], unchanged, len(given), *shared)
    data.check()
    started = time.perf_counter()
    figures = segmentation_figures(model, processor, data, windows, arguments.num_workers)
    seconds = time.perf_counter() - started
    figures = {name if name == "pixels" else f"{name}_percent": value for name, value in figures.items()}
    circumstances = {
        "window_size": windows and windows.size,
        "window_stride": windows and windows.stride,
        "reduce_labels": reduce_labels,
        **{name: getattr(arguments, name) for name in ("short_side", "ignored_class")},
    }
    pictures = {"overlays.png": overlays(model, processor, data, figures["mean_iou_percent"], windows=windows)}
    return figures, {**circumstances, **common(arguments, chosen, len(data) / seconds)}, pictures


def common(arguments: argparse.Namespace, split: str, images_per_s: float) -> dict[str, Any]:
    """How the figures of every kind of model were measured."""
    return {
        "model": arguments.model_name_or_path,
        "dataset": arguments.dataset,
        "dataset_name": arguments.dataset_name,
        "split": split,
        "dtype": arguments.dtype,
        "images_per_s": round(images_per_s, 1),
        **environment(arguments.device),
    }


def evaluate_classifier(arguments: argparse.Namespace, chosen: str) -> Evaluation:
    """The evaluation of a classifier on a split."""
    source = arguments.dataset, arguments.dataset_name
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
        **{name: getattr(arguments, name) for name in ("image_column_name", "label_column_name", "batch_size")},
        "skipped": data.skipped,
        "image_size": [processor.size.height, processor.size.width],
        "crop_pct": getattr(processor, "crop_pct", None),
    }
    pictures = {"confusion_matrix.png": draw_confusion(figures), "per_class_accuracy.png": draw_per_class(figures)}
    return figures, {**circumstances, **common(arguments, chosen, len(data) / seconds)}, pictures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    available = find_data_files(arguments.dataset, arguments.dataset_name)
    chosen = pick_split(available, *([arguments.split] if arguments.split else EVALUATION_SPLITS))
    evaluate = evaluate_segmenter if is_segmenter(arguments) else evaluate_classifier
    figures, circumstances, pictures = evaluate(arguments, chosen)
    write_text(as_json({**circumstances, **figures}), arguments.output / "eval_metrics.json")
    for name, figure in pictures.items():
        figure.savefig(arguments.output / name, dpi=150)
    shown = {name: value for name, value in figures.items() if not isinstance(value, (dict, list))}
    shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in shown.items()}
    return {"output": str(arguments.output), **shown, **circumstances}
