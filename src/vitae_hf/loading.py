# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained classifier and its image processor, from a folder or by name."""

from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel


def load_classifier(name: str | Path, dtype: str = "float32", **options) -> PreTrainedModel:
    """A model with all its trained weights, from a folder or by its Hub name, in evaluation mode.

    Args:
        options: for `from_pretrained`.

    Raises:
        ValueError: it is no image classifier; a backbone would get a random head.
    """
    model, loading = AutoModelForImageClassification.from_pretrained(
        name, dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{name} is not a trained image classifier: it lacks {', '.join(missing)}")
    return model


def load_processor(name: str, image_size: list[int] | None = None, crop_pct: float | None = None):
    """The saved image processor, with another size or crop where one is given.

    Args:
        name: folder or Hub name.
        image_size: side, or height and width, in pixels.
        crop_pct: share of the resized side that the centre crop keeps.

    Raises:
        ValueError: it takes no `crop_pct`, as those of other families.
    """
    overrides = {}
    if image_size is not None:
        overrides["size"] = {"height": image_size[0], "width": image_size[-1]}
    if crop_pct is not None:
        overrides["crop_pct"] = crop_pct
    processor = AutoImageProcessor.from_pretrained(name, **overrides)
    if crop_pct is not None and not hasattr(type(processor), "crop_pct"):
        raise ValueError(f"`crop_pct` does not go with the image processor of {name}, a {type(processor).__name__}")
    return processor
