# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run leaves for people to read: its curves and its model card."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure


def draw_curves(log_history: list[dict], path: Path) -> None:
    """Loss, accuracy (where it was measured) and learning rate over epochs, as a picture.

    Args:
        log_history: of the Trainer's state.
        path: what to write.
    """
    curves = {
        "loss": ("loss", "eval_loss"),
        "accuracy (%)": ("eval_top1", "eval_top5"),
        "learning rate": ("learning_rate",),
    }
    if not any("eval_top1" in entry for entry in log_history):
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


def model_card(
    template: Path, *, dataset: str, eval_split: str, metrics: dict[str, float], **values: object
) -> ModelCard:
    """The card of a trained classifier, with its accuracy in the metadata.

    Args:
        template: Jinja file; see `model_cards/trained.md`.
        dataset: Hub name or folder.
        eval_split: what was evaluated.
        metrics: `top1` and `top5` in percent, and `loss`.
        values: whatever else the template names.

    Raises:
        jinja2.UndefinedError: the template uses a value that is missing in a way that cannot be printed.
    """
    is_hub_name = not Path(dataset).exists()
    data = ModelCardData(
        model_name=str(values["model_name"]),
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vitae", "vision", "image-classification"],
        datasets=[dataset] if is_hub_name else None,
        metrics=["accuracy"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset if is_hub_name else "imagefolder",
                dataset_name=Path(dataset).name,
                dataset_split=eval_split,
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(metrics[key], 3),
            )
            for name, key in (("top-1 accuracy (%)", "top1"), ("top-5 accuracy (%)", "top5"))
        ],
    )
    return ModelCard.from_template(
        data, template_path=str(template), dataset=dataset, eval_split=eval_split, **metrics, **values
    )


PRETRAINING_CARD = """---
{{ card_data }}
---

# {{ model_name }}

A ViTAE masked autoencoder (`{{ preset }}`, encoder of {{ "{:,}".format(encoder_parameters) }} parameters, decoder of
{{ "{:,}".format(decoder_parameters) }}), pretrained at {{ size }} pixels on {{ train_images }} images of
`{{ dataset }}` without their labels. Made with [vitae-hf](https://arxiv.org/abs/2106.03348), ViTAE for Hugging Face
Transformers. It is a beginning for fine-tuning and classifies nothing by itself:

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{{ model_name }}", num_labels=10, trust_remote_code=True)
```

loads the encoder, makes its 1×1 kernels 3×3 ones without changing the function, and draws a new classifier.

## Results

Mean squared error of the masked patches ({{ "{:.0%}".format(mask_ratio) }} of each image
{{- ", normalised patch by patch" if norm_pix_loss else "" }}) on {{ eval_images }} images of the split
`{{ eval_split }}`: {{ "{:.4f}".format(loss) }}.
{% if skipped %}{{ skipped }} unreadable pictures were met and skipped.{% endif %}

![Input, what the encoder saw, and what it made of it]({{ picture }})

![Loss and learning rate over epochs](training_curves.png)

## Training

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
| environment | {{ environment }} |

## Limits

What it has learned is what its images show. The licence of the weights follows from theirs; state it before publishing.
"""


def pretraining_card(*, dataset: str, **values: object) -> ModelCard:
    """The card of a masked autoencoder.

    Args:
        dataset: Hub name or folder.
        values: what `PRETRAINING_CARD` names.
    """
    data = ModelCardData(
        model_name=str(values["model_name"]),
        library_name="transformers",
        tags=["vitae", "vision", "masked-autoencoder"],
        datasets=None if Path(dataset).exists() else [dataset],
    )
    return ModelCard.from_template(data, template_str=PRETRAINING_CARD, dataset=dataset, **values)
