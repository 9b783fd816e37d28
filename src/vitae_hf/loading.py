# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained network and its image processor: both complete, or an error that says what is wrong."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, httpx
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessor,
)
from transformers.utils import logging

from .class_names import distinct
from .files import PICTURES, find_model
from .image_processing_vitae import ViTAEImageProcessor, ViTAEImageProcessorPil
from .messages import listed
from .model_folders import MODEL_FILES, check_model, read_json, reason_of


logger = logging.get_logger(__name__)

OUR_PROCESSORS = (ViTAEImageProcessor, ViTAEImageProcessorPil)
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
DENSE = ("Detection", "Segmentation", "Estimation")
"""How the library's names of classes end that say where in a picture something is."""
DENSE_CLASSES: dict[str, Any] = {
    "ForObjectDetection": AutoModelForObjectDetection,
    "ForUniversalSegmentation": AutoModelForUniversalSegmentation,
    "ForSemanticSegmentation": AutoModelForSemanticSegmentation,
    "ForDepthEstimation": AutoModelForDepthEstimation,
}
"""Those of them that [`load_trained`] takes, and what loads them."""


def load_trained(
    name: str | Path,
    image_size: list[int] | None = None,
    crop_pct: float | None = None,
    *,
    dtype: str = "float32",
    headless: bool = False,
    dense: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """A model with all its trained weights, in evaluation mode, and its image processor.

    Args:
        name: as [`find_model`] takes it.
        image_size, crop_pct: of the image processor, see [`load_processor`].
        dtype: of the weights; `"auto"`: as they were saved.
        headless: take a network without a classifier too, if one was saved: a base model, a backbone or one that was
            pretrained without labels.
        dense: take a detector, a segmenter or a network for depth too, if one was saved.
        options: for `from_pretrained`.

    Returns:
        Model and image processor.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: the model does another task; weights are missing, as those of the classifier in a backbone's folder;
            they are not those of the network that the configuration describes; or the image processor does not go with
            the model.
    """
    source = find_checked_model(name, **options)
    shared = {option: options[option] for option in (*HUB_OPTIONS, "trust_remote_code") if option in options}
    kinds = ["a classifier", *["a network without a head"] * headless]
    kinds += ["a detector", "a segmenter", "a network for depth"] * dense
    check_task(source, " or ".join(kinds), tuple(DENSE_CLASSES) if dense else (), **shared)
    model_class = saved_class(source, **shared) if headless or dense else AutoModelForImageClassification
    model, loading = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(loading["missing_keys"]):
        if headless or dense:
            raise ValueError(f"the weights of {name} lack {len(missing)} tensors of the network: {listed(missing)}")
        raise ValueError(f"{name} is not a trained image classifier: it lacks {listed(missing)}")
    return model.eval(), load_processor(source, image_size, crop_pct, model.config, **shared)


def example_pictures(processor: Any) -> list[Any]:
    """Pictures that an image processor takes: the package's, the grey one for one channel, noise for other numbers."""
    channels = len(processor.image_mean)
    if channels in (1, 3):
        return list(map(str, PICTURES if channels == 3 else PICTURES[1:]))
    return list(np.random.default_rng(0).integers(0, 256, (2, 96, 96, channels), dtype=np.uint8))


def segmentation_processor(short_side: int, reduce_labels: bool = False) -> SegformerImageProcessor:
    """The image processor of a segmenter: pictures whose shorter side is `short_side` pixels, in their own proportions.

    Args:
        reduce_labels: whether 0 in a mask is no class, and 1 the first.
    """
    return SegformerImageProcessor(size=in_proportion(short_side), do_reduce_labels=reduce_labels)


def in_proportion(short_side: int) -> dict[str, int]:
    """The `size` of an image processor that keeps the proportions of pictures, in pixels."""
    return {"shortest_edge": short_side, "longest_edge": 4 * short_side}


def check_task(source: str, wanted: str, taken: tuple[str, ...] = (), **options: Any) -> None:
    """See that a model was not saved as one that says where in a picture something is.

    Args:
        wanted: what is taken, in words.
        taken: how the names of such classes end that are taken too.
        options: for `from_pretrained`.

    Raises:
        ValueError: it was, and is of none of the classes in `taken`.
    """
    saved = saved_architecture(source, **options)
    if saved.endswith(DENSE) and not saved.endswith(taken):
        raise ValueError(f"{source} holds {saved}, and this takes {wanted}")


def saved_architecture(source: str, **options: Any) -> str:
    """The name of the class that a model was saved as; empty if its configuration does not say."""
    return (PreTrainedConfig.get_config_dict(source, **options)[0].get("architectures") or [""])[0]


def any_size_options(model: PreTrainedModel) -> dict[str, Any]:
    """What a model must be called with to take images of any size: the plain variants interpolate their positions."""
    return {"interpolate_pos_encoding": True} if getattr(model.config, "is_plain", False) else {}


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def label_names(config: PreTrainedConfig) -> dict[int, str]:
    """`id2label` of a model that is built, [`distinct`] and in order: the library has numbers there then, not text."""
    id2label: Any = config.id2label
    numbers = sorted(id2label)
    return dict(zip(numbers, distinct(id2label[number] for number in numbers)))


def order_of_classes(before: dict[int, str], now: dict[int, str]) -> list[int] | None:
    """Where the classes that a head is for now are among those that it was trained for, if they are the same classes.

    Of as many other classes, the head is only something to begin with, and a warning says so, unless the names that it
    was trained for are the library's `LABEL_0` and so on.

    Args:
        before, now: names by number.
    """
    old, new = ([names[number] for number in sorted(names)] for names in (before, now))
    if old == new or len(old) != len(new):
        return None
    if sorted(old) == sorted(new) and len(set(old)) == len(old):
        return [old.index(name) for name in new]
    if any(name != f"LABEL_{number}" for number, name in enumerate(old)):
        logger.warning(
            "The head was trained for as many other classes, %s: it begins with what it knows of them.", listed(old)
        )
    return None


def class_scores(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes, as the library's pipeline gives them: (…, classes) -> (…, classes).

    Of several labels for a picture, and of a single one, each has a probability of its own. A regression has none: its
    scores are the numbers that it predicts.
    """
    if config.problem_type == "regression":
        return logits
    is_multi_label = config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
    return logits.sigmoid() if is_multi_label else logits.softmax(-1)


def best_labels(config: PreTrainedConfig, logits: torch.Tensor, most: int = 5) -> list[dict[str, Any]]:
    """The likeliest labels of a picture, as the library's pipeline gives them: `{"label": …, "score": …}`."""
    scores, classes = class_scores(config, logits).topk(min(most, len(logits)))
    names = label_names(config)
    return [{"label": names[index], "score": score} for score, index in zip(scores.tolist(), classes.tolist())]


def saved_class(source: str, **options: Any) -> Any:
    """What loads a model as it was saved, as its configuration says; of an unknown class, the base model."""
    config = AutoConfig.from_pretrained(source, **options)
    saved = (config.architectures or [""])[0]
    if saved.endswith("Backbone"):  # not `AutoBackbone`, which takes a folder for the name of a network of timm
        return MODEL_FOR_BACKBONE_MAPPING[type(config)]
    classes = {
        "ForImageClassification": AutoModelForImageClassification,
        "ForMaskedImageModeling": AutoModelForMaskedImageModeling,
        "ForPreTraining": AutoModelForPreTraining,
        **DENSE_CLASSES,
    }
    return next((auto_class for head, auto_class in classes.items() if head in saved), AutoModel)


def find_checked_model(name: str | Path, **options: Any) -> str:
    """[`find_model`], with a [`check_model`] of the folder, or of the repository after its download.

    A name that leads nowhere is left to `from_pretrained`, which says what is wrong with it.

    Args:
        name: as `find_model` takes it.
        options: for `from_pretrained`.

    Raises:
        ValueError: see `check_model`.
    """
    source = find_model(name)
    folder = source
    if not Path(source).is_dir():
        try:
            hub = {option: options[option] for option in HUB_OPTIONS if option in options}
            folder = snapshot_download(source, allow_patterns=MODEL_FILES, **hub)
        except (OSError, HFValidationError, httpx.HTTPError):
            return source
    check_model(folder)
    return source


def load_processor(
    source: str,
    image_size: list[int] | None,
    crop_pct: float | None,
    config: PreTrainedConfig,
    **options: Any,
) -> Any:
    """The saved image processor, with another size or crop where one is given.

    Args:
        source: folder or Hub name.
        image_size: side, or height and width, in pixels.
        crop_pct: share of the resized side that the centre crop keeps.
        config: of the model whose images it prepares.
        options: for `from_pretrained`.

    Raises:
        ValueError: the processor takes no `crop_pct`, as those of other families; its settings are out of bounds; or
            it has means for another number of channels than the model.
    """
    if image_size is not None:
        options["size"] = {"height": image_size[0], "width": image_size[-1]}
    if crop_pct is not None:
        options["crop_pct"] = crop_pct
    for path in (Path(source, "preprocessor_config.json"), Path(source, "processor_config.json")):
        if path.exists():
            read_json(path)
    try:
        processor = AutoImageProcessor.from_pretrained(source, **options)
        if isinstance(processor, OUR_PROCESSORS):
            processor.validate()
            check_channels(processor, config)
    except OSError:
        raise
    except Exception as error:  # settings that are no numbers raise errors of every kind
        raise ValueError(f"the image processor of {source} cannot be used: {reason_of(error)}") from None
    if crop_pct is not None and not hasattr(type(processor), "crop_pct"):
        raise ValueError(f"`crop_pct` does not go with the image processor of {source}, a {type(processor).__name__}")
    return processor


def check_channels(processor: ViTAEImageProcessor | ViTAEImageProcessorPil, config: PreTrainedConfig) -> None:
    """See that the processor has one mean for all channels, or one for each channel of the model.

    Raises:
        ValueError: it has another number of means.
    """
    num_channels, means = getattr(config, "num_channels", None), processor.image_mean
    if isinstance(means, (list, tuple)) and num_channels not in (None, len(means)):
        raise ValueError(f"it has means of {len(means)} channels, the model takes {num_channels}")
