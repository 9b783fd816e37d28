# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: of what was trained, of a masked autoencoder, of the authors' variants and of what was converted."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import RECIPES
from ..image_processing_vitae import ViTAEImageProcessorPil
from ..messages import listed
from ..presets import config_from_preset
from .variants import IMAGENET_1K, REMOTE_SENSING, VARIANTS, VITAE, VITAE_V2, Accuracy, RemoteSensing, Variant


TEMPLATES = Path(__file__).parent / "templates"
PARITY = Path(__file__).with_name("parity_cpu.json")  # what `scripts/measure_parity.py` measured
COMMON: dict[str, Any] = {  # metadata of a classifier's card
    "library_name": "transformers",
    "pipeline_tag": "image-classification",
    "tags": ["vitae", "vision", "image-classification"],
    "metrics": ["accuracy"],
}

# What the metadata of a task call its figures: metric type, name, and key among the metrics.
FIGURES = {
    "image-classification": (
        ("accuracy", "top-1 accuracy (%)", "top1"),
        ("accuracy", "top-5 accuracy (%)", "top5"),
    ),
    "image-segmentation": (
        ("mean_iou", "mean IoU (%)", "mean_iou"),
        ("accuracy", "pixel accuracy (%)", "pixel_accuracy"),
    ),
    "object-detection": (
        ("mean_average_precision", "box AP (%)", "map"),
        ("mean_average_precision", "box AP50 (%)", "map_50"),
    ),
    "instance-segmentation": (
        ("mean_average_precision", "box AP (%)", "map"),
        ("mean_average_precision", "mask AP (%)", "mask_map"),
    ),
}
PIPELINE_TAGS = {"instance-segmentation": "image-segmentation"}  # where the Hub has no tag of a task's own name


def model_card(
    template: Path,
    *,
    dataset: str,
    eval_split: str,
    metrics: dict[str, Any],
    task: str = "image-classification",
    **values: Any,
) -> ModelCard:
    """The card of a trained model, with its figures in the metadata.

    Args:
        template: Jinja file in `templates/`.
        dataset: Hub name or folder.
        eval_split: what was evaluated.
        metrics: those of the task in `FIGURES`, in percent, and whatever the template names.
        task: one of `FIGURES`.
        values: whatever else the template names.

    Raises:
        jinja2.UndefinedError: the template formats a value that is missing.
    """
    is_hub_name = not Path(dataset).exists()
    task_metadata: dict[str, Any] = {
        "pipeline_tag": PIPELINE_TAGS.get(task, task),
        "tags": ["vitae", "vision", task],
        "metrics": sorted({metric_type for metric_type, _, _ in FIGURES[task]}),
    }
    data = ModelCardData(
        **{**COMMON, **task_metadata},
        model_name=str(values["model_name"]),
        datasets=[dataset] if is_hub_name else None,
        eval_results=[
            EvalResult(
                task_type=PIPELINE_TAGS.get(task, task),
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


def variant_card(preset: str, name: str | None = None, source: dict[str, Any] | None = None) -> ModelCard:
    """The card of a variant of the authors, or of a checkpoint of it that was converted.

    Args:
        preset: one of `VARIANTS`.
        name: under which users load it; default: `org/` and the preset.
        source: of a converted checkpoint, what `convert_checkpoint` returns; default: the card is about no weights.

    Raises:
        KeyError: the preset is not a variant of the authors.
    """
    variant, name = VARIANTS[preset], name or f"org/{preset}"
    about: dict[str, Any] = {
        "parameters": variant.parameters,
        "num_labels": 1000,
        "image_size": 224,
        "is_imagenet_1k": True,
    }
    about |= {key: source[key] for key in about if source}
    processor = ViTAEImageProcessorPil(size=about["image_size"])
    recipe = variant.recipe or preset
    parity = json.loads(PARITY.read_text(encoding="utf-8"))
    is_comparable = about["is_imagenet_1k"] and about["image_size"] == 224
    # Where the authors print figures of several checkpoints, a file does not say which of these it is.
    is_known = variant.has_weights and is_comparable and (source is None or len(variant.printed) == 1)
    data = variant_metadata(variant, name.split("/")[-1], about["is_imagenet_1k"], is_known)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "variant.md"),
        name=name,
        preset=preset,
        variant=variant,
        source=source,
        is_comparable=is_comparable,
        hidden_size=config_from_preset(preset).hidden_size,
        resized=int(about["image_size"] / processor.crop_pct),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        recipe_name=recipe,
        recipe=yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")),
        errors=parity["errors"].get(preset),
        measured_on=f"{parity['device']}, torch {parity['torch']}, {parity['date']}",
        measured_presets=list(parity["errors"]),
        **about,
    )


def remote_sensing_card(name: str) -> ModelCard:
    """The card of weights in `REMOTE_SENSING`, which come without them."""
    known = REMOTE_SENSING[name]
    class_name = "ViTAEForPreTraining" if known.num_labels is None else "ViTAEForImageClassification"
    return _converted_card(f"org/{name}", known.preset, class_name, known, None)


def converted_card(name: str, source: dict[str, Any]) -> ModelCard:
    """The card of a converted file that [`variant_card`] is not about, as a backbone or an autoencoder.

    Args:
        name: under which users load it.
        source: what `convert_checkpoint` returns.
    """
    is_autoencoder = source["class"].endswith("ForPreTraining")
    weights = f"{source['preset']}-mae" if is_autoencoder else source["preset"]
    return _converted_card(name, source["preset"], source["class"], REMOTE_SENSING.get(weights), source)


def _converted_card(
    name: str, preset: str, class_name: str, known: RemoteSensing | None, source: dict[str, Any] | None
) -> ModelCard:
    papers = (VITAE, VITAE_V2) if preset.startswith("vitaev2") else (VITAE,)
    heads = {"ForImageClassification": "image-classification", "ForSemanticSegmentation": "image-segmentation"}
    task = next((task for head, task in heads.items() if class_name.endswith(head)), "image-feature-extraction")
    licence: dict[str, Any] = (
        {"license": "mit", "license_link": f"https://github.com/{known.repository}"} if known else {}
    )
    data = ModelCardData(
        **licence,
        library_name="transformers",
        pipeline_tag=task,
        tags=["vitae", "vision", *(f"arxiv:{paper.arxiv}" for paper in (*papers, *([known.paper] if known else [])))],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "converted.md"),
        name=name,
        preset=preset,
        class_name=class_name,
        known=known,
        source=source,
        papers=papers,
        in_words=lambda counts: listed(f"{group} ({count})" for group, count in counts.items()),
    )


def variant_metadata(variant: Variant, name: str, is_imagenet_1k: bool, has_results: bool) -> ModelCardData:
    """Metadata of a variant's card.

    Args:
        name: of the model.
        is_imagenet_1k: whether its classes are those.
        has_results: whether the accuracies that the authors print for ImageNet-1k are those of its weights.
    """
    results = printed_results(variant.printed[IMAGENET_1K], variant.papers[-1].url) if has_results else None
    return ModelCardData(
        license="other",
        license_name="not-stated",
        license_link="https://github.com/ViTAE-Transformer/ViTAE-Transformer#statement",
        **{**COMMON, "tags": [*COMMON["tags"], *(f"arxiv:{paper.arxiv}" for paper in variant.papers)]},
        datasets=["ILSVRC/imagenet-1k"] if is_imagenet_1k else None,
        model_name=name if has_results else None,
        eval_results=results,
    )


def printed_results(accuracy: Accuracy, url: str) -> list[EvalResult]:
    """Accuracies for a card's metadata, as the authors print them at `url`."""
    names = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)", "real": "top-1 accuracy with ReaL labels (%)"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="ILSVRC/imagenet-1k",
            dataset_name=IMAGENET_1K,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=names[key],
            metric_value=value,
            verified=False,
            source_name="as printed by the authors",
            source_url=url,
        )
        for key, value in accuracy._asdict().items()
        if value is not None
    ]


def space_card(model: str, settings: dict[str, Any], description: str, tag: str, text: str) -> str:
    """The README of a Space that shows a model. The Hub reads the settings of the Space from its front matter.

    Args:
        model: its name, with or without its owner.
        settings: the fields of this kind of Space: its `sdk`, colours, and so on.
        description: in a few words.
        tag: what the Space is about, besides ViTAE and classification.
        text: below the front matter.
    """
    fields = {
        "title": f"What does {model.split('/')[-1]} see?",
        "emoji": "👀",
        **settings,
        "license": "apache-2.0",
        "short_description": description,
        "tags": ["vitae", "image-classification", tag],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def pretraining_card(template: Path, *, dataset: str, **values: Any) -> ModelCard:
    """The card of a network that was pretrained without labels.

    Args:
        template: Jinja file in `templates/`.
        dataset: Hub name or folder.
        values: whatever else the template names.
    """
    kind = "masked-autoencoder" if values["is_autoencoder"] else "masked-image-modeling"
    data = ModelCardData(
        model_name=str(values["model_name"]),
        library_name="transformers",
        tags=["vitae", "vision", kind],
        datasets=None if Path(dataset).exists() else [dataset],
    )
    return ModelCard.from_template(data, template_path=str(template), dataset=dataset, **values)
