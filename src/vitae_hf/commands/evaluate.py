# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How good is a trained classifier, segmenter or detector on labelled images, overall and class by class?

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

A detector takes the data of `vitae detect`, and is measured by COCO's average precision of boxes, and of masks if both
it and the data have them. `predictions.png` shows some pictures.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..class_names import read_class_names
from ..data.samples import ImageDataset, evaluation_pixels
from ..data.sources import EVALUATION_SPLITS, find_data_files, load_labelled_images, local_folder, pick_split
from ..dense.segmentation.data import SegmentationDataset, load_masked_images, mask_class_names
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
from ..loading import (
    DENSE,
    find_checked_model,
    in_proportion,
    label_names,
    load_processor,
    load_trained,
    saved_architecture,
)
from ..training.average import FOLDER as AVERAGE_FOLDER
from . import add_image_size, command_parser


OPTIONS: dict[str, dict[str, Any]] = {
    "a classifier": {
        **dict.fromkeys(("label_column_name", "image_size", "crop_pct", "real_labels")),
        "batch_size": 64,
        "on_bad_sample": "error",
    },
    "a segmenter": dict.fromkeys(
        ("mask_column_name", "short_side", "window_size", "window_stride", "ignored_class", "reduce_labels")
    ),
    "a detector": {"objects_column_name": None, "box_format": "xywh", "on_bad_object": "error"},
}
"""For each kind of model the arguments that go with it alone, and their defaults."""
KINDS = {
    "ForSemanticSegmentation": "a segmenter",
    "ForObjectDetection": "a detector",
    "ForUniversalSegmentation": "a detector",
}
"""What a model is whose class ends so; it is a classifier otherwise."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae evaluate", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name of a trained model")
    parser.add_argument("--dataset", required=True, help="Hub name or local folder of labelled images")
    parser.add_argument("--dataset_name", help="its configuration, if several")
    parser.add_argument("--split", help="default: validation, else test")
    parser.add_argument("--image_column_name", help="the column of images, if there are several")
    parser.add_argument("--label_column_name", help="classifiers: the column of labels, if there are several")
    parser.add_argument("--mask_column_name", help="segmenters: the column of masks, if there are several")
    parser.add_argument("--objects_column_name", help="detectors: the column of objects, if there are several")
    parser.add_argument(
        "--class_names",
        type=Path,
        help="for labels that are numbers: a text file with a class on each line, or imagenet-1k",
    )
    add_image_size(parser)
    parser.add_argument(
        "--crop_pct", type=float, help="classifiers: share of the resized side that the centre crop keeps"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="of a classifier; default: 64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument(
        "--real_labels", type=Path, help="classifiers: real.json of ImageNet's validation set, for the ReaL accuracy"
    )
    parser.add_argument(
        "--on_bad_sample",
        choices=["error", "skip"],
        default="error",
        help="classifiers: an unreadable picture; default: error",
    )
    parser.add_argument("--short_side", type=int, help="segmenters: shorter side of the resized pictures, in pixels")
    parser.add_argument("--window_size", type=int, help="segmenters: side of the windows over a picture, in pixels")
    parser.add_argument(
        "--window_stride", type=int, help="segmenters: pixels from one window to the next; default: 3/4 of the size"
    )
    parser.add_argument(
        "--reduce_labels",
        action=argparse.BooleanOptionalAction,
        help="segmenters: 0 in a mask is no class, and 1 the first; default: as the image processor says",
    )
    parser.add_argument("--ignored_class", type=int, help="segmenters: a class in masks that does not count")
    parser.add_argument(
        "--box_format", choices=["xywh", "xyxy"], default="xywh", help="detectors: what the numbers of a box are"
    )
    parser.add_argument(
        "--on_bad_object",
        choices=["error", "skip"],
        default="error",
        help="detectors: a wrong box, class or mask; default: error",
    )
    parser.add_argument("--output", type=Path, help="folder to write; default: outputs/evaluation-MODEL")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        model = Path(arguments.model_name_or_path).resolve()
        is_of_a_run = model.name == AVERAGE_FOLDER or model.name.startswith("checkpoint-")
        arguments.output = Path("outputs") / "-".join(["evaluation", *model.parts[-2 if is_of_a_run else -1 :]])
    return arguments


def kind_of(arguments: argparse.Namespace) -> str:
    """The kind of the model, a key of `OPTIONS`.

    Raises:
        ValueError: an argument was given that does not go with it.
    """
    with about(arguments.model_name_or_path):
        saved = saved_architecture(find_checked_model(arguments.model_name_or_path))
    kind = next((kind for ending, kind in KINDS.items() if saved.endswith(ending)), "a classifier")
    if saved.endswith(DENSE) and kind == "a classifier":
        name = arguments.model_name_or_path
        raise ValueError(f"{name} holds {saved}, and this takes a classifier, a segmenter or a detector")
    for other, options in OPTIONS.items():
        given = [f"--{name}" for name, default in options.items() if getattr(arguments, name) != default]
        if given and other != kind:
            raise ValueError(f"{given[0]} goes with {other}; {arguments.model_name_or_path} is {kind}")
    for name in ("short_side", "window_size", "window_stride"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if arguments.window_stride is not None and arguments.window_size is None:
        raise ValueError("--window_stride takes a --window_size too")
    return kind


Evaluation = tuple[dict[str, Any], dict[str, Any], Mapping[str, Callable[[], Figure]]]
"""Figures, how they were measured, and what draws pictures, by the names of their files."""


def evaluate_segmenter(arguments: argparse.Namespace) -> Evaluation:
    """The evaluation of a segmenter."""
    columns = arguments.image_column_name, arguments.mask_column_name
    splits = load_masked_images(arguments.dataset, arguments.dataset_name, *columns)
    chosen = choose_split(arguments, splits)
    size, stride, short_side = arguments.window_size, arguments.window_stride, arguments.short_side
    windows = None if size is None else Windows(size, max(1, 3 * size // 4) if stride is None else stride)
    with about(arguments.model_name_or_path):
        model, processor = load_trained(arguments.model_name_or_path, dtype=arguments.dtype, dense=True)
        options: dict[str, Any] = {} if short_side is None else {"size": in_proportion(short_side)}
        if windows is not None and short_side is None:
            options["do_resize"] = False
        if options:
            processor = load_processor(find_model(arguments.model_name_or_path), None, None, model.config, **options)
            if getattr(processor, "do_center_crop", False):
                raise ValueError("its image processor crops pictures: --short_side and --window_size do not go with it")
    model.to(arguments.device)
    names = label_names(model.config)
    given = list(mask_class_names(splits, arguments.class_names, names).values())
    reduce_labels = arguments.reduce_labels
    if reduce_labels is None:
        reduce_labels = bool(getattr(processor, "do_reduce_labels", False))
    shared = reduce_labels, None, arguments.ignored_class, align_labels(given, names)
    data = SegmentationDataset(splits[chosen], None, len(given), *shared)
    data.check()
    started = time.perf_counter()
    figures = segmentation_figures(model, processor, data, windows, arguments.num_workers)
    seconds = time.perf_counter() - started
    figures = {name if name == "pixels" else f"{name}_percent": value for name, value in figures.items()}
    circumstances = {
        "window_size": windows and windows.size,
        "window_stride": windows and windows.stride,
        "reduce_labels": reduce_labels,
        **{name: getattr(arguments, name) for name in ("mask_column_name", "short_side", "ignored_class")},
    }
    draw = partial(overlays, model, processor, data, figures["mean_iou_percent"], windows=windows)
    return figures, {**circumstances, **common(arguments, chosen, len(data) / seconds)}, {"overlays.png": draw}


def common(arguments: argparse.Namespace, split: str, images_per_s: float) -> dict[str, Any]:
    """How the figures of every kind of model were measured."""
    return {
        "model": arguments.model_name_or_path,
        "dataset": arguments.dataset,
        "dataset_name": arguments.dataset_name,
        "image_column_name": arguments.image_column_name,
        "split": split,
        "dtype": arguments.dtype,
        "images_per_s": round(images_per_s, 1),
        **environment(arguments.device),
    }


def evaluate_detector(arguments: argparse.Namespace) -> Evaluation:
    """The evaluation of a detector."""
    # These take the extra `detection`, which the other kinds of model do without.
    from ..dense.detection.data import DetectionDataset, has_segmentations, load_boxed_images
    from ..dense.detection.evaluation import detection_figures, predictions
    from ..dense.detection.models import has_masks

    columns = arguments.image_column_name, arguments.objects_column_name
    splits, given = load_boxed_images(arguments.dataset, arguments.dataset_name, arguments.class_names, *columns)
    chosen = choose_split(arguments, splits)
    with about(arguments.model_name_or_path):
        model, processor = load_trained(arguments.model_name_or_path, dtype=arguments.dtype, dense=True)
    model.to(arguments.device)
    options = {name: getattr(arguments, name) for name in ("box_format", "on_bad_object")}
    classes = align_labels(list(given.values()), label_names(model.config))
    with_masks = has_masks(model.config) and has_segmentations(splits[chosen])
    data = DetectionDataset(splits[chosen], None, given, with_masks, classes=classes, **options)
    data.check()
    started = time.perf_counter()
    figures = detection_figures(model, processor, data, arguments.num_workers)
    seconds = time.perf_counter() - started
    figures = {f"{name}_percent": value for name, value in figures.items()}
    draw = partial(predictions, model, processor, data, figures["map_percent"])
    circumstances = {"objects_column_name": arguments.objects_column_name, **options}
    return figures, {**circumstances, **common(arguments, chosen, len(data) / seconds)}, {"predictions.png": draw}


def check_data(dataset: str, name: str | None) -> None:
    """See that there are data.

    Raises:
        OSError, ValueError: there are none.
    """
    if (folder := local_folder(dataset, name)) is not None:
        _ = folder.contents
    else:
        find_data_files(dataset, name)


def choose_split(arguments: argparse.Namespace, available: Iterable[str]) -> str:
    """The split to evaluate, of those that there are."""
    return pick_split(available, *([arguments.split] if arguments.split else EVALUATION_SPLITS))


def evaluate_classifier(arguments: argparse.Namespace) -> Evaluation:
    """The evaluation of a classifier."""
    source = arguments.dataset, arguments.dataset_name
    chosen = choose_split(arguments, find_data_files(*source))
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
        **{name: getattr(arguments, name) for name in ("label_column_name", "batch_size")},
        "skipped": data.skipped,
        "image_size": [processor.size.height, processor.size.width],
        "crop_pct": getattr(processor, "crop_pct", None),
    }
    pictures = {
        "confusion_matrix.png": partial(draw_confusion, figures),
        "per_class_accuracy.png": partial(draw_per_class, figures),
    }
    return figures, {**circumstances, **common(arguments, chosen, len(data) / seconds)}, pictures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_data(arguments.dataset, arguments.dataset_name)  # before a model is loaded
    evaluate = {"a classifier": evaluate_classifier, "a segmenter": evaluate_segmenter, "a detector": evaluate_detector}
    figures, circumstances, pictures = evaluate[kind_of(arguments)](arguments)
    write_text(as_json({**circumstances, **figures}), arguments.output / "eval_metrics.json")
    for name, draw in pictures.items():
        draw().savefig(arguments.output / name, dpi=150)
    shown = {name: value for name, value in figures.items() if not isinstance(value, (dict, list))}
    shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in shown.items()}
    return {"output": str(arguments.output), **shown, **circumstances}
