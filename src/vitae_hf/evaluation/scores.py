# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A classifier on a whole split: its scores, figures from them, overall and by class, and two pictures of these.

Classes are numbered as the model numbers them; [`align_labels`] translates the labels of a data set.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..class_names import imagenet_names
from ..data.samples import IGNORED_LABEL, ImageDataset, collate
from ..loading import any_size_options
from ..messages import listed
from .metrics import ReaLAccuracy, TopKAccuracy, confusion_matrix
from .plain_text import plain_text


logger = logging.get_logger(__name__)

MOST_NAMES = 20  # classes that a picture has room for
SYNSET = re.compile(r"n\d{8}")
OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def align_labels(names: list[str], id2label: dict[int, str]) -> np.ndarray:
    """The class of a model for each label of a data set: the one of the same name.

    If the model has only the generic names `LABEL_0`, `LABEL_1` and so on, it is the one of the same number. Synsets,
    as folders of ImageNet are called (`n01440764`), stand for ImageNet's names. The data set may lack classes of the
    model, as a folder does that has no pictures of a class.

    Args:
        names: of the data set's classes, by label.
        id2label: the model's names.

    Returns:
        `(labels,)` numbers of classes.

    Raises:
        ValueError: the model lacks classes of the data set; the message names those that only one of them has.
    """
    model_names = [id2label[index] for index in range(len(id2label))]
    is_generic = all(name == f"LABEL_{index}" for index, name in enumerate(model_names))
    if is_generic and len(names) == len(model_names):
        logger.warning(
            "The model calls its classes LABEL_0, LABEL_1 and so on: they are taken for those of the data in their"
            " order, %s.",
            listed(names),
        )
        return np.arange(len(names))
    if all(SYNSET.fullmatch(name) for name in names) and not set(names) & set(model_names):
        by_synset = imagenet_names()
        names = [by_synset.get(name, name) for name in names]
    if not set(names) <= set(model_names):
        raise ValueError(
            f"the data set and the model must have the same classes; the data set has {_listed(names, model_names)},"
            f" the model {_listed(model_names, names)}"
        )
    return np.array([model_names.index(name) for name in names])


def _listed(names: list[str], others: list[str], most: int = 10) -> str:
    """How many names there are, and which of them are not among `others`."""
    alone = [name for name in names if name not in set(others)]
    which = ", ".join(map(repr, alone[:most])) + (", …" if len(alone) > most else "")
    return f"{len(names)} classes" + (f", {len(alone)} of them alone: {which}" if alone else "")


def read_real_labels(path: str | os.PathLike[str], split: datasets.Dataset) -> list[list[int]]:
    """The labels that people confirmed for each picture of a split: the published `real.json`.

    The file has a list of labels for each picture of ImageNet's validation set, in the order of the official names. If
    the files of the split have such names (`ILSVRC2012_val_00000001…`), the split may be in any order, or a part of the
    set. If they have others, its rows must be in the order of the file.

    Args:
        path: of the file.
        split: with an undecoded `image`, as `load_labelled_images` gives it.

    Raises:
        ValueError: file and split do not fit each other.

    Source: Beyer et al. 2020, "Are we done with ImageNet?".
    """
    try:
        real = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    rows = real if isinstance(real, list) else [None]
    if not all(isinstance(labels, list) and all(type(label) is int for label in labels) for labels in rows):
        raise ValueError(f"{path} must hold a list for each picture, of the numbers of its classes")
    num_classes = split.features["label"].num_classes
    if any(not 0 <= label < num_classes for labels in real for label in labels):
        raise ValueError(f"{path} has labels that are none of the {num_classes} classes of the split")
    found = [OFFICIAL_NAME.search(file or "") for file in split.flatten()["image.path"]]
    if not any(found):
        if len(real) != len(split):
            raise ValueError(f"{path} has labels for {len(real)} pictures, but the split has {len(split)}")
        return real
    if not all(found):
        raise ValueError(f"cannot tell which labels of {path} to use: only some files are named ILSVRC2012_val_…")
    numbers = [int(match[1]) for match in found if match]
    if not 1 <= min(numbers) <= max(numbers) <= len(real):
        raise ValueError(
            f"{path} has labels for {len(real)} pictures, but the split has numbers {min(numbers)} to {max(numbers)}"
        )
    return [real[number - 1] for number in numbers]


@torch.no_grad()
def predict(
    model: PreTrainedModel, data: ImageDataset, batch_size: int = 64, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every picture that can be read, with a progress bar.

    Args:
        model: a classifier, on the device to use. One with learned positions takes any size: they are interpolated.
        data: with `drop_bad`.
        batch_size, num_workers: of the data loader.

    Returns:
        Scores `(N, classes)` in float32, and the rows `(N,)` of the split that they belong to.

    Raises:
        ValueError: no picture can be read, or a score is not finite.
    """
    model.eval()
    options = any_size_options(model)
    loader = DataLoader(data, batch_size, num_workers=num_workers, collate_fn=collate)
    batches: list[torch.Tensor] = []
    present: list[bool] = []
    with tqdm(total=len(data), desc="evaluation", unit=" images") as progress:
        for batch in loader:
            is_present = batch["labels"] != IGNORED_LABEL
            present += is_present.tolist()
            if is_present.any():
                pixel_values = batch["pixel_values"][is_present].to(model.device, model.dtype)
                batches.append(model(pixel_values, **options).logits.float().cpu())
            progress.update(len(is_present))
    if not batches:
        raise ValueError(f"none of the {len(data)} pictures of this split can be read")
    scores = torch.cat(batches).numpy()
    if bad := int((~np.isfinite(scores)).any(1).sum()):
        raise ValueError(f"the scores of {bad} of {len(scores)} pictures are not finite")
    return scores, np.flatnonzero(present)


def all_figures(
    scores: np.ndarray, labels: np.ndarray, names: list[str], real: list[list[int]] | None = None
) -> dict[str, Any]:
    """All figures, ready for JSON: accuracies in percent, loss, accuracy by class, confusion matrix.

    Args:
        scores: `(N, classes)`.
        labels: `(N,)`.
        names: of the classes.
        real: the labels of each image that people confirmed, for the ReaL accuracy.

    Returns:
        `top5_percent` only for more than five classes. A class without images has `None` for its accuracy. The rows
        of `confusion_matrix` are true classes, its columns predicted ones, both in the order of `names`.
    """
    ks = [k for k in (1, 5) if k == 1 or k < len(names)]
    top = TopKAccuracy().compute(predictions=scores, references=labels, ks=ks)
    predictions = scores.argmax(1)
    matrix = confusion_matrix(labels, predictions, len(names))
    figures = {"images": len(labels), **{f"{name}_percent": value for name, value in top.items()}}
    figures["loss"] = torch.nn.functional.cross_entropy(torch.tensor(scores), torch.tensor(labels)).item()
    if real is not None:
        result = ReaLAccuracy().compute(predictions=predictions, references=real)
        figures["real_percent"] = result["real"] if result["images"] else None
        figures["real_images"] = result["images"]
    return {**figures, **class_figures(matrix, names)}


def class_figures(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What [`all_figures`] says of the classes, from their confusion matrix `(classes, classes)`."""
    by_class = zip(names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "per_class": {
            name: {"accuracy_percent": 100 * right / images if images else None, "correct": right, "images": images}
            for name, right, images in by_class
        },
        "most_confused": most_confused(matrix, names),
        "confusion_matrix": matrix.tolist(),
    }


def most_confused(matrix: np.ndarray, names: list[str], most: int = 20) -> list[dict[str, Any]]:
    """The pairs of true and predicted class that were mistaken most often."""
    mistakes = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    pairs = zip(*(index.tolist() for index in np.unravel_index(order, matrix.shape)))
    return [
        {"true": names[row], "predicted": names[column], "images": int(mistakes[row, column])}
        for row, column in pairs
        if mistakes[row, column]
    ]


def as_json(figures: dict[str, Any]) -> str:
    """[`all_figures`] as JSON with one line for each figure, each class and each row of the matrix."""
    entries = []
    for name, value in figures.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
            text = "{\n  " + ",\n  ".join(lines) + "\n }"
        elif isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


@plain_text
def draw_confusion(figures: dict[str, Any]) -> Figure:
    """The confusion matrix of [`all_figures`]: names and counts, or many classes as a heat map and the worst pairs."""
    names, matrix = [_short(name) for name in figures["per_class"]], np.array(figures["confusion_matrix"])
    shares, what = 100 * matrix / matrix.sum(1, keepdims=True).clip(1), "images of the true class (%)"
    if len(names) <= MOST_NAMES:
        side = 2 + 0.5 * len(names) + 0.06 * max(map(len, names))
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axis = figure.subplots()
        heat = axis.imshow(shares, cmap="Blues", norm=PowerNorm(1, 0, 100))
        _write_cells(axis, matrix, shares, names)
    else:
        figure = Figure(figsize=(15, 7), layout="constrained")
        axis, beside = figure.subplots(1, 2, width_ratios=(6, 5))
        block = -(-len(names) // 250)
        what += f", largest of {block}×{block} cells" if block > 1 else ""
        cells = _largest(shares, block)
        end = block * len(cells) - 0.5
        heat = axis.imshow(cells, cmap="Blues", norm=PowerNorm(0.4, 0, 100), extent=(-0.5, end, end, -0.5))
        _write_pairs(beside, figures["most_confused"])
    axis.set(xlabel="predicted class", ylabel="true class", title=_title(figures))
    figure.colorbar(heat, ax=axis, label=what, shrink=0.8)
    return figure


def _largest(shares: np.ndarray, block: int) -> np.ndarray:
    """The largest of each `block` × `block` cells: a single cell of a large matrix would be smaller than a pixel."""
    rows = -(-len(shares) // block)
    padded = np.pad(shares, (0, rows * block - len(shares)))
    return padded.reshape(rows, block, rows, block).max((1, 3))


def _write_cells(axis: Axes, matrix: np.ndarray, shares: np.ndarray, names: list[str]) -> None:
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(matrix):
        color = "white" if shares[row, column] > 50 else "black"
        axis.text(column, row, matrix[row, column], ha="center", va="center", color=color, fontsize=9)


def _write_pairs(axis: Axes, pairs: list[dict[str, Any]]) -> None:
    axis.set_axis_off()
    axis.set_title("most often mistaken (images, true class → predicted)", loc="left")
    lines = [f"{pair['images']:4}  {_short(pair['true'])} → {_short(pair['predicted'])}" for pair in pairs]
    axis.text(0, 0.98, "\n".join(lines), transform=axis.transAxes, va="top", family="monospace", linespacing=2.1)


@plain_text
def draw_per_class(figures: dict[str, Any]) -> Figure:
    """Accuracy of each class of [`all_figures`] as a bar, the best on top; of many classes the 20 best and 20 worst."""
    rows = [(row["accuracy_percent"], name, row) for name, row in figures["per_class"].items() if row["images"]]
    rows.sort(key=lambda row: row[0])
    parts = {"": rows}
    if len(rows) > 2 * MOST_NAMES:
        parts = {f"the {MOST_NAMES} worst": rows[:MOST_NAMES], f"the {MOST_NAMES} best": rows[-MOST_NAMES:]}
    height = 1.6 + 0.28 * max(map(len, parts.values()))
    figure = Figure(figsize=(7.5 * len(parts), height), layout="constrained")
    for axis, (title, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items()):
        axis.barh(range(len(part)), [accuracy for accuracy, _, _ in part])
        axis.set_yticks(range(len(part)), [_short(name) for _, name, _ in part])
        for line, (_, _, row) in enumerate(part):
            axis.text(101, line, f"{row['correct']} / {row['images']}", va="center", fontsize=9)
        axis.axvline(figures["top1_percent"], color="black", linestyle=":")
        axis.set(title=title, xlabel="accuracy (%), right / images; dotted: all images", xlim=(0, 100))
        axis.margins(y=0.01)
    figure.suptitle(_title(figures))
    return figure


def _title(figures: dict[str, Any]) -> str:
    return (
        f"top-1 {figures['top1_percent']:.2f} % of {figures['images']:,} images, {len(figures['per_class']):,} classes"
    )


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
