# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a segmenter predicts."""

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...evaluation.colours import class_colours
from ...evaluation.plain_text import plain_text


MOST_NAMES = 16  # classes in a legend


@plain_text
def draw_overlays(
    rows: list[tuple[PIL.Image.Image, np.ndarray, np.ndarray]], names: list[str], title: str, opacity: float = 0.65
) -> Figure:
    """Pictures beside their true and predicted masks, with a legend of the classes that occur.

    Args:
        rows: picture, true mask and prediction, both `(height, width)`.
        names: of the classes; one called "background" is left uncoloured.
        opacity: of the colours.
    """
    colours = class_colours(len(names))
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(15, 0.9 + 1.95 * lines), layout="constrained")
    axes = figure.subplots(lines, 6, squeeze=False).reshape(-1, 3)
    for axis in axes.flat:
        axis.set_axis_off()
    for triple, (picture, mask, prediction) in zip(axes, rows):
        triple[0].imshow(picture)
        for axis, classes in zip(triple[1:], (mask, prediction)):
            axis.imshow(_overlay(np.asarray(picture.convert("L")) / 255, classes, colours, names, opacity))
    for column, what in enumerate(("picture", "truth", "prediction") * 2):
        figure.axes[column].set_title(what, fontsize=10)
    occurring = np.bincount(np.concatenate([classes.ravel() for row in rows for classes in row[1:]]), minlength=256)
    shown = [index for index in np.argsort(-occurring[: len(names)], kind="stable") if occurring[index]][:MOST_NAMES]
    shown = [index for index in sorted(shown) if names[index] != "background"]
    handles = [Patch(color=colours[index], label=names[index]) for index in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, frameon=False)
    figure.suptitle(title)
    return figure


def _overlay(
    picture: np.ndarray, classes: np.ndarray, colours: np.ndarray, names: list[str], opacity: float
) -> np.ndarray:
    """A grey picture `(height, width)` tinted by class: `(height, width, 3)`; ignored pixels are dark."""
    is_known = classes < len(names)
    tint = np.where(is_known[..., None], colours[np.where(is_known, classes, 0)], 0)
    share = opacity * np.where(is_known, np.array([name != "background" for name in names])[is_known * classes], 1)
    return picture[..., None] * (1 - share[..., None]) + tint * share[..., None]
