# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The curves of a training run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curves(log_history: list[dict[str, Any]], path: Path, accuracies: Sequence[str] = ()) -> None:
    """Write loss, accuracy and learning rate over epochs as a picture.

    Args:
        log_history: of the Trainer's state.
        path: file to write.
        accuracies: metrics of the evaluations, in percent, such as `top1`; drawn if the history has any of them.
    """
    curves = {
        "loss": ("loss", "eval_loss"),
        "accuracy (%)": [f"eval_{name}" for name in accuracies],
        "learning rate": ("learning_rate",),
    }
    if not any(key in entry for entry in log_history for key in curves["accuracy (%)"]):
        del curves["accuracy (%)"]
    figure = Figure(figsize=(13 / 3 * len(curves), 3.6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, len(curves)), curves.items()):
        for key in keys:
            points = [(entry["epoch"], float(entry[key])) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
