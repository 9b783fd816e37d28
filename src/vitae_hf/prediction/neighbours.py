# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a folder whose embeddings point in the direction of a given one's, and a sheet that shows them."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..deployment.inference import prepare_for_inference
from ..evaluation.plain_text import plain_text
from ..failures import about
from ..image_processing_vitae import read_image, to_rgb
from ..loading import fingerprint, load_trained
from .embeddings import read_blocks
from .rows import predict


MOST_LINES = 20  # queries in a sheet
MOST_COLUMNS = 20  # neighbours beside one
SHOWN_PIXELS = 224  # longer side of a picture in a sheet


class Neighbour(NamedTuple):
    """A picture of a folder.

    Attributes:
        path, label: as they were written.
        score: the cosine between its embedding and the query's.
    """

    path: str
    label: str | None
    score: float


def load_recorded(record: dict[str, Any], device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """The model, on a device, and the image processor that `predict.json` names, as they were used.

    Raises:
        OSError: they cannot be had.
        ValueError: the same, see [`load_trained`], or they are not what they were.
    """
    name = record.get("model")
    if not isinstance(name, str):
        raise ValueError("predict.json names no model")
    size = record.get("image_size"), record.get("crop_pct")
    options = {"revision": record["revision"]} if record.get("revision") else {}
    with about(f"{name}, which made the embeddings"):
        model, processor = load_trained(name, *size, headless=True, **options)
    now = {"weights": fingerprint(model), **{key: getattr(processor, key) for key in ("image_mean", "image_std")}}
    now = json.loads(json.dumps(now))  # in which tuples are lists
    if changed := [key for key, value in now.items() if key in record and record[key] != value]:
        raise ValueError(f"{name} is another model now than that of the embeddings: {' and '.join(changed)} differ")
    model.to(device)  # type: ignore[arg-type]  # hidden by the library's decorator
    return prepare_for_inference(model, getattr(torch, record.get("dtype", "float32"))), processor


def embed(model: PreTrainedModel, processor: Any, picture: PIL.Image.Image) -> np.ndarray:
    """The embedding `(C,)` of a picture, as `predict` makes it, in float32.

    Raises:
        ValueError: the model gives none.
    """
    (row,) = predict(model, processor, [picture], embeddings="float32")
    if row["error"] is not None:
        raise ValueError(row["error"])
    return row["embedding"]


def nearest(folder: str | Path, queries: np.ndarray, top_k: int) -> list[list[Neighbour]]:
    """For each query the `top_k` pictures with the highest cosine, the best first; of equals the earlier row.

    The folder is read once, a block at a time, so that memory does not grow with it.

    Args:
        queries: `(Q, C)` embeddings.

    Raises:
        ValueError: see [`read_blocks`], or its embeddings have another length.
    """
    queries = _normalised(queries)
    best: list[list[Neighbour]] = [[] for _ in queries]
    for block in read_blocks(folder):
        if not len(block.embeddings):
            continue
        if block.embeddings.shape[1] != queries.shape[1]:
            raise ValueError(
                f"the embeddings of {folder} have {block.embeddings.shape[1]} numbers, those of the picture"
                f" {queries.shape[1]}: another model made them"
            )
        scores = _normalised(block.embeddings) @ queries.T  # (N, Q)
        for index, own in enumerate(scores.T):
            rows = np.argsort(-own, kind="stable")[:top_k]
            named = zip(block.paths.take(rows).to_pylist(), block.labels.take(rows).to_pylist(), own[rows].tolist())
            found = [Neighbour(*values) for values in named]
            best[index] = sorted(best[index] + found, key=lambda neighbour: -neighbour.score)[:top_k]
    return best


def _normalised(embeddings: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nc,nc->n", embeddings, embeddings))[:, None]
    return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)


def find_picture(path: str, sources: Iterable[str]) -> Path:
    """The file of a path that was found below one of these sources.

    Raises:
        FileNotFoundError: it is not there any more, or it never was a file of its own.
    """
    for place in (*(Path(source, path) for source in sources), Path(path)):
        if place.is_file():
            return place
    raise FileNotFoundError(f"there is no file {path} (any more)")


@plain_text
def draw_sheet(
    queries: dict[str, PIL.Image.Image], neighbours: list[list[Neighbour]], sources: Iterable[str] = ()
) -> Figure:
    """A line of pictures for each query: itself, then its neighbours with score, label and path.

    Of many queries and neighbours, the first 20 are drawn. A neighbour whose file is not there is a grey field.

    Args:
        queries: by name.
        neighbours: of each, as [`nearest`] gives them.
        sources: folders below which their files may lie.
    """
    shown = [found[:MOST_COLUMNS] for found in neighbours[:MOST_LINES]]
    columns = 1 + max(map(len, shown))
    figure = Figure(figsize=(1.9 * columns, 2.5 * len(shown)), layout="constrained")
    lines = figure.subplots(len(shown), columns, squeeze=False)
    for axis in lines.flat:
        axis.set_axis_off()
    for line, (name, picture), found in zip(lines, queries.items(), shown):
        _draw_picture(line[0], picture, f"query\n{_short(name)}")
        for axis, neighbour in zip(line[1:], found):
            label = "" if neighbour.label is None else f" {neighbour.label}"
            title = f"{neighbour.score:.3f}{label}\n{_short(neighbour.path)}"
            try:
                _draw_picture(axis, read_image(find_picture(neighbour.path, sources)), title)
            except (OSError, ValueError) as error:
                _draw_absence(axis, str(error), title)
    return figure


def _draw_picture(axis: Axes, picture: PIL.Image.Image, title: str) -> None:
    picture = to_rgb(picture)
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    axis.imshow(picture)
    axis.set_title(title, fontsize=8)


def _draw_absence(axis: Axes, reason: str, title: str) -> None:
    """A grey field with a sentence."""
    axis.imshow(np.full((SHOWN_PIXELS, SHOWN_PIXELS, 3), 200, np.uint8))
    axis.text(0.5, 0.5, fill(reason, 26), ha="center", va="center", fontsize=7, transform=axis.transAxes)
    axis.set_title(title, fontsize=8)


def _short(path: str, most: int = 30) -> str:
    """The end of a path, which tells more than its beginning."""
    return path if len(path) <= most else "…" + path[-(most - 1) :]
