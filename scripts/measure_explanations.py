# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Do the maps of an explanation lie on the garment?

    python scripts/measure_explanations.py outputs/vitae-nano-fashion --output results/explanation_fashion

Explains the test images of `examples/fashion_mnist_mini`, whose background is black, and computes two figures for each
kind of map. The first is its mean on the garment over its mean on the whole image (median over images). It is 1 for a
map that ignores the garment. The second is how often its highest place is on the garment; for a random place this is
the share of the image that the garment covers. Also draws three images with their maps.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from kept_results import positive
from matplotlib.figure import Figure

from vitae_hf.environment import environment
from vitae_hf.evaluation.explanation import BRANCH_COLOURS, Explanation, draw_heat, explain, stage_name
from vitae_hf.failures import about, run_command
from vitae_hf.files import output_file, write_json
from vitae_hf.loading import load_trained


TEST = Path(__file__).parents[1] / "examples" / "fashion_mnist_mini" / "test-*.parquet"
BLACK = 30  # of 255, since resizing makes the background slightly brighter near the garment


def named_maps(explanation: Explanation) -> dict[str, np.ndarray]:
    attention = zip(explanation.cells, explanation.attention)
    return {
        "Grad-CAM": explanation.grad_cam,
        **{f"rollout, {stage_name(stage)}": rollout for stage, rollout in explanation.rollout.items()},
        **{f"attention, {cell}": looks for cell, looks in attention if looks is not None},
        **{f"attention's share, {cell}": share for cell, share in zip(explanation.cells, explanation.attention_share)},
    }


def on_garment(heat: np.ndarray, garment: np.ndarray) -> tuple[float, bool]:
    """A map's mean on the garment over its mean on the whole image, and whether its highest place is on the garment."""
    rows, columns = (size // cells for size, cells in zip(garment.shape, heat.shape))
    heat = heat.repeat(rows, 0).repeat(columns, 1)
    return heat[garment].mean() / max(heat.mean(), 1e-12), bool(garment.flat[heat.argmax()])


def measure(model, processor, split: Dataset) -> dict:
    rows, areas = {}, []
    for picture in split["image"]:
        explanation = explain(model, processor, picture)
        garment = explanation.image.mean(-1) > BLACK
        areas.append(garment.mean())
        for name, heat in named_maps(explanation).items():
            rows.setdefault(name, []).append(on_garment(heat, garment))
    figures = {
        name: {
            "on_garment_over_mean": round(float(np.median([ratio for ratio, _ in values])), 2),
            "highest_on_garment_percent": round(100 * float(np.mean([is_on for _, is_on in values])), 1),
        }
        for name, values in rows.items()
    }
    return {"images": len(areas), "garment_percent": round(100 * float(np.mean(areas)), 1), "maps": figures}


def draw_maps(explanations: list[Explanation], path: Path) -> None:
    """Draw a line for each image: the image, Grad-CAM, the rollout of the last stage, shares of first and last cell."""
    figure = Figure(figsize=(11, 2.4 * len(explanations)), layout="constrained")
    for axes, explanation in zip(figure.subplots(len(explanations), 5, squeeze=False), explanations):
        image, best = explanation.image, explanation.labels[0]
        axes[0].imshow(image)
        axes[0].set_axis_off()
        axes[0].set_title(f"{best['label']} {best['score']:.0%}", fontsize=10)
        stage, rollout = list(explanation.rollout.items())[-1]
        draw_heat(axes[1], image, explanation.grad_cam, "Grad-CAM", cmap="inferno")
        draw_heat(axes[2], image, rollout, f"rollout, {stage_name(stage)}", cmap="inferno", vmin=0)
        for axis, cell in ((axes[3], 0), (axes[4], -1)):
            title, share = f"branches, {explanation.cells[cell]}", explanation.attention_share[cell]
            heat = draw_heat(axis, image, share, title, cmap=BRANCH_COLOURS, vmin=0, vmax=1)
        bar = figure.colorbar(heat, ax=axes[4])
        bar.set_ticks([0, 0.5, 1], labels=["convolution", "half", "attention"])
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name_or_path", help="folder or Hub name of a classifier of Fashion-MNIST")
    parser.add_argument("--output", type=output_file, required=True, help="what to write, without .json and .png")
    parser.add_argument("--images", type=positive, default=1000, help="how many")
    arguments = parser.parse_args(argv)
    with about(arguments.model_name_or_path):
        model, processor = load_trained(arguments.model_name_or_path)
    split = load_dataset("parquet", data_files={"test": str(TEST)}, split="test")
    split = split.select(range(min(arguments.images, len(split))))
    record = {"model": arguments.model_name_or_path, **measure(model, processor, split), **environment()}
    write_json(record, arguments.output.with_suffix(".json"))
    shown = [explain(model, processor, split[row]["image"]) for row in range(min(3, len(split)))]
    draw_maps(shown, arguments.output.with_suffix(".png"))
    return record


if __name__ == "__main__":
    run_command(main)
