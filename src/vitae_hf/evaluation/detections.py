# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a detector or a segmenter finds in a picture: boxes, classes, scores and masks, as users get them, and drawn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..loading import label_names
from .colours import class_colours
from .plain_text import plain_text
from .windows import Windows


LONGEST_SIDE = 2048
"""Of a picture that is drawn, in pixels, unless it has more itself."""


def enlarged(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A picture's width and height, enlarged until both have `side` pixels, or the longer one as many as are drawn."""
    scale = max(1, min(side / min(size), LONGEST_SIDE / max(size)))
    return round(scale * size[0]), round(scale * size[1])


@dataclass
class Detections:
    """What a detector or a segmenter found in a picture.

    Attributes:
        picture: upright and in RGB.
        objects: as [`as_objects`] has them, or as [`find_classes`] has the classes of pixels.
        names: of the classes.
        seconds: how long it took.
        chosen: the class whose objects alone are drawn; default: all.
    """

    picture: PIL.Image.Image
    objects: dict[str, Any]
    names: list[str]
    seconds: float
    chosen: str | None = None

    def scores(self) -> dict[str, float]:
        """The best score of each class that was found, or its share of the picture; the highest first."""
        found: dict[str, float] = {}
        for label, score in zip(self.objects["labels"].tolist(), self.objects["scores"].tolist()):
            found[self.names[label]] = max(score, found.get(self.names[label], 0.0))
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def drawn(self, side: int = 448) -> np.ndarray:
        """The picture with its objects, enlarged until both sides have at least `side` pixels: uint8 `(h, w, 3)`."""
        objects = self.objects
        if self.chosen in self.names:
            kept = objects["labels"] == self.names.index(self.chosen)
            objects = {key: values[kept] for key, values in objects.items()}
        width, height = enlarged(self.picture.size, side)
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        axis = figure.add_axes((0, 0, 1, 1))
        draw_objects(axis, self.picture, objects, self.names, fontsize=9)
        axis.set_aspect("auto")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def detect(model: Any, processor: Any, picture: PIL.Image.Image, threshold: float = 0.5) -> Detections:
    """What a model finds in a picture, with the names of the classes; see [`find_objects`] and [`find_classes`]."""
    start = time.perf_counter()
    if type(model).__name__.endswith("ForSemanticSegmentation"):
        objects = find_classes(model, processor, picture)
    else:
        objects = find_objects(model, processor, picture, threshold)
    return Detections(picture, objects, list(label_names(model.config).values()), time.perf_counter() - start)


@torch.no_grad()
def outputs_for(model: Any, processor: Any, picture: PIL.Image.Image, windows: Windows | None = None) -> Any:
    """What a model in evaluation mode gives for a picture that its image processor prepares, whole or in windows."""
    pixel_values = processor(picture, return_tensors="pt").pixel_values.to(model.device, model.dtype)
    model.eval()
    return model(pixel_values=pixel_values) if windows is None else windows.outputs(model, pixel_values)


def segment(model: Any, processor: Any, picture: PIL.Image.Image, windows: Windows | None = None) -> np.ndarray:
    """The class of each pixel of a picture as a segmenter predicts it: `(height, width)`.

    Args:
        windows: in which it looks at what the image processor gives; default: at the whole.
    """
    outputs = outputs_for(model, processor, picture, windows)
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[picture.size[::-1]])[0].cpu().numpy()


def find_classes(model: Any, processor: Any, picture: PIL.Image.Image) -> dict[str, torch.Tensor]:
    """The classes that a segmenter finds in a picture, the largest first.

    Returns:
        `labels` `(N,)`, `scores` `(N,)`, which are shares of the picture, and `masks` `(N, height, width)`, true where
        the class is.
    """
    classes = torch.from_numpy(segment(model, processor, picture))
    labels, counts = classes.unique(return_counts=True)
    order = counts.argsort(descending=True)
    masks = classes == labels[order, None, None]
    return {"labels": labels[order], "scores": counts[order] / classes.numel(), "masks": masks}


def find_objects(
    model: Any, processor: Any, picture: PIL.Image.Image, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """The objects that a model finds in a picture; see [`as_objects`].

    Args:
        model: any detector of the library, Mask2Former, or one of this package's R-CNNs.
        processor: its image processor.
        threshold: lowest score.
    """
    outputs = outputs_for(model, processor, picture)
    return as_objects(processor, outputs, [picture.size[::-1]], threshold)[0]


def as_objects(
    processor: Any, outputs: Any, sizes: Sequence[tuple[int, int]], threshold: float
) -> list[dict[str, torch.Tensor]]:
    """What a model gave, by the image processor of its kind.

    Args:
        sizes: height and width of each picture.
        threshold: lowest score.

    Returns:
        For each picture, on the CPU, `scores` and `labels` `(N,)`, `boxes` `(N, 4)` as left, top, right and bottom in
        pixels, and, if the model has masks, `masks` `(N, height, width)`, true where the object is.
    """
    values = {name: value.float() if is_half(value) else value for name, value in outputs.items()}
    outputs = type(outputs)(**values)
    if "masks_queries_logits" not in outputs:
        found = processor.post_process_object_detection(outputs, threshold, target_sizes=list(sizes))
        return [{name: values.cpu() for name, values in one.items()} for one in found]
    found = processor.post_process_instance_segmentation(
        outputs, threshold, target_sizes=list(sizes), return_binary_maps=True
    )
    return [of_segments(one["segmentation"].cpu(), one["segments_info"]) for one in found]


def is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def of_segments(maps: torch.Tensor, segments: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Masks `(N, height, width)` with what the library says of each, and the boxes around them."""
    masks = maps.bool() if segments else torch.zeros(0, *maps.shape[-2:], dtype=torch.bool)
    boxes = torch.zeros(len(segments), 4)
    for box, mask in zip(boxes, masks):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box[:] = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    scores = torch.tensor([segment["score"] for segment in segments])
    labels = torch.tensor([segment["label_id"] for segment in segments], dtype=torch.int64)
    return {"scores": scores, "labels": labels, "boxes": boxes, "masks": masks}


@plain_text
def draw_objects(
    axis: Axes, picture: PIL.Image.Image, objects: dict[str, Any], names: list[str], fontsize: int = 6
) -> None:
    """Draw a picture with boxes, masks, classes and scores, those that there are of these; classes stand at boxes."""
    colours = class_colours(len(names))
    pixels = np.asarray(picture.convert("RGB")) / 255
    for label, mask in zip(objects["labels"], objects.get("masks", ())):
        inside = np.asarray(mask, bool)
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * colours[int(label)]
    axis.imshow(pixels)
    axis.set_axis_off()
    scores = objects.get("scores", [None] * len(objects["labels"]))
    for box, label, score in zip(objects.get("boxes", ()), objects["labels"], scores):
        left, top, right, bottom = map(float, box)
        colour = colours[int(label)]
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.5))
        words = names[int(label)] if score is None else f"{names[int(label)]} {float(score):.2f}"
        style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
        axis.text(
            left, top, words, fontsize=fontsize, color="white", bbox=style, clip_on=True, verticalalignment="bottom"
        )


@plain_text
def draw_found(
    rows: list[tuple[PIL.Image.Image, dict[str, Any], dict[str, Any]]], names: list[str], title: str
) -> Figure:
    """Pictures with what is there beside what was found, two pairs in a line.

    Args:
        rows: picture, truth and prediction, as [`draw_objects`] takes them.
        names: of the classes.
    """
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(15, 0.6 + 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, 4, squeeze=False).reshape(-1, 2)
    for axis in axes.flat:
        axis.set_axis_off()
    for pair, (picture, truth, found) in zip(axes, rows):
        draw_objects(pair[0], picture, truth, names)
        draw_objects(pair[1], picture, found, names)
    for column, what in enumerate(("truth", "prediction") * 2):
        figure.axes[column].set_title(what, fontsize=10)
    figure.suptitle(title)
    return figure
