# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run leaves for people to read: its curves and its model card."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure


# What a task's metadata call its figures: metric type, name, and key among the metrics.
FIGURES = {
    "image-classification": (
        ("accuracy", "top-1 accuracy (%)", "top1"),
        ("accuracy", "top-5 accuracy (%)", "top5"),
    ),
    "image-segmentation": (
        ("mean_iou", "mean IoU (%)", "mean_iou"),
        ("accuracy", "pixel accuracy (%)", "pixel_accuracy"),
    ),
}


def draw_curves(log_history: list[dict], path: Path, task: str = "image-classification") -> None:
    """Loss, accuracy and learning rate over epochs, as a picture.

    Args:
        log_history: of the Trainer's state.
        path: what to write.
        task: whose figures to draw, one of `FIGURES`.
    """
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    curves = {
        "loss": ("loss", "eval_loss"),
        "accuracy (%)": tuple(f"eval_{key}" for _, _, key in FIGURES[task]),
        "learning rate": ("learning_rate",),
    }
    for axis, (title, keys) in zip(figure.subplots(1, 3), curves.items()):
        for key in keys:
            points = [(entry["epoch"], float(entry[key])) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)


def model_card(
    template: Path,
    *,
    dataset: str,
    eval_split: str,
    metrics: dict[str, float],
    task: str = "image-classification",
    **values: object,
) -> ModelCard:
    """The card of a trained model, with its figures in the metadata.

    Args:
        template: Jinja file; see `model_cards`.
        dataset: Hub name or folder.
        eval_split: what was evaluated.
        metrics: those of the task in `FIGURES`, in percent, and whatever the template names.
        task: one of `FIGURES`.
        values: whatever else the template names.

    Raises:
        jinja2.UndefinedError: the template uses a value that is missing in a way that cannot be printed.
    """
    is_hub_name = not Path(dataset).exists()
    data = ModelCardData(
        model_name=str(values["model_name"]),
        library_name="transformers",
        pipeline_tag=task,
        tags=["vitae", "vision", task],
        datasets=[dataset] if is_hub_name else None,
        metrics=sorted({metric_type for metric_type, _, _ in FIGURES[task]}),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset if is_hub_name else "imagefolder",
                dataset_name=Path(dataset).name,
                dataset_split=eval_split,
                metric_type=metric_type,
                metric_name=name,
                metric_value=round(metrics[key], 3),
            )
            for metric_type, name, key in FIGURES[task]
        ],
    )
    return ModelCard.from_template(
        data, template_path=str(template), dataset=dataset, eval_split=eval_split, **metrics, **values
    )
