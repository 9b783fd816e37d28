# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained classifier and its image processor, from a folder or by name."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, httpx
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .image_processing_vitae import ViTAEImageProcessor, ViTAEImageProcessorPil
from .messages import listed
from .model_folders import MODEL_FILES, check_model, read_json, reason_of


OUR_PROCESSORS = (ViTAEImageProcessor, ViTAEImageProcessorPil)
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")


def check_source(name: str | Path, **options) -> None:
    """[`check_model`] of a folder, or of a Hub name after its download.

    Args:
        options: for `from_pretrained`, which says what is wrong with a name that leads nowhere.
    """
    folder = name
    if not Path(name).is_dir():
        try:
            hub = {option: options[option] for option in HUB_OPTIONS if option in options}
            folder = snapshot_download(str(name), allow_patterns=MODEL_FILES, **hub)
        except (OSError, HFValidationError, httpx.HTTPError):
            return
    check_model(folder)


def load_classifier(name: str | Path, dtype: str = "float32", **options) -> PreTrainedModel:
    """A model with all its trained weights, from a folder or by its Hub name, in evaluation mode.

    Args:
        options: for `from_pretrained`.

    Raises:
        ValueError: it is no image classifier, of which a backbone would get a random head, or its weights are not those
            of the network that its configuration describes.
    """
    check_source(name, **options)
    model, loading = AutoModelForImageClassification.from_pretrained(
        name, dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{name} is not a trained image classifier: it lacks {listed(missing)}")
    return model


def check_channels(processor: ViTAEImageProcessor | ViTAEImageProcessorPil, config: PreTrainedConfig | None) -> None:
    """See that there is a mean for each channel, where there is more than one number for all."""
    num_channels, means = getattr(config, "num_channels", None), processor.image_mean
    if isinstance(means, (list, tuple)) and num_channels not in (None, len(means)):
        raise ValueError(f"it has means of {len(means)} channels, the model takes {num_channels}")


def load_processor(
    name: str | Path,
    image_size: list[int] | None = None,
    crop_pct: float | None = None,
    config: PreTrainedConfig | None = None,
    **options,
):
    """The saved image processor, with another size or crop where one is given.

    Args:
        name: folder or Hub name.
        image_size: side, or height and width, in pixels.
        crop_pct: share of the resized side that the centre crop keeps.
        config: of the model that it is for.
        options: for `from_pretrained`.

    Raises:
        ValueError: it takes no `crop_pct`, as those of other families, its settings are out of bounds, or it has means
            for other channels than the model.
    """
    if image_size is not None:
        options["size"] = {"height": image_size[0], "width": image_size[-1]}
    if crop_pct is not None:
        options["crop_pct"] = crop_pct
    for path in (Path(name, "preprocessor_config.json"), Path(name, "processor_config.json")):
        if path.exists():
            read_json(path)
    try:
        processor = AutoImageProcessor.from_pretrained(name, **options)
        if isinstance(processor, OUR_PROCESSORS):
            processor.validate()
            check_channels(processor, config)
    except OSError:
        raise
    except Exception as error:  # of every kind, from values that are no numbers
        raise ValueError(f"the image processor of {name} cannot be used: {reason_of(error)}") from None
    if crop_pct is not None and not hasattr(type(processor), "crop_pct"):
        raise ValueError(f"`crop_pct` does not go with the image processor of {name}, a {type(processor).__name__}")
    return processor
