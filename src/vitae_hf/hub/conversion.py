# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' checkpoints: read without running code from them, recognised, renamed and written as model folders."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..configuration_vitae import ViTAEFamilyConfig
from ..failures import of_a_missing_package
from ..files import whole_folder
from ..image_processing_vitae import ViTAEImageProcessorPil
from ..loading import label_names, load_trained
from ..messages import listed, printable
from ..presets import PRESETS, config_from_preset
from .cards import variant_card
from .checksums import sha256, write_sums
from .original_names import original_layout
from .torch_files import NoTensor, read_torch_file
from .variants import VARIANTS


IGNORED = "relative_position_index"
"""A table of ViTAEv2's windows that is in the authors' checkpoints, though no network reads it."""


def detect_preset(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Name of the preset that an original state dict belongs to, from its normal cells.

    Raises:
        ValueError: it is none of the variants; the message says what was found.
    """
    cells = {match.groups() for key in state_dict if (match := re.match(r"layers\.(\d+)\.NC\.(\d+)\.", key))}
    first = state_dict.get("layers.2.NC.0.PCM.0.weight")
    first_convolution = None if first is None else tuple(first.shape)
    for name in PRESETS:
        config = config_from_preset(name)
        third = 0 if config.has_class_token else 2  # the authors' third stage, which has cells in every variant
        hidden_size, groups = config.hidden_sizes[third], config.conv_groups[third]
        convolution = (int(config.mlp_ratio * hidden_size), hidden_size // groups, 3, 3)
        depths = (0, 0, *config.depths) if config.has_class_token else config.depths
        expected_cells = {(str(stage), str(cell)) for stage, depth in enumerate(depths) for cell in range(depth)}
        has_class_token = "fc_norm.weight" in state_dict
        if (cells, first_convolution, has_class_token) == (expected_cells, convolution, config.has_class_token):
            return name
    raise ValueError(
        f"these are not the tensors of a ViTAE variant ({len(cells)} normal cells, first convolution"
        f" {first_convolution or 'missing'}); known: {', '.join(PRESETS)}"
    )


def config_from_original(state_dict: Mapping[str, torch.Tensor], preset: str | None = None) -> ViTAEFamilyConfig:
    """The configuration of an original state dict: its preset, with the label count and image size of its tensors.

    Raises:
        ValueError: unknown preset or variant, no classifier, or a position table that is not square.
    """
    preset = preset or detect_preset(state_dict)
    config = config_from_preset(preset)
    if "head.weight" not in state_dict or state_dict["head.weight"].ndim != 2:
        raise ValueError("there is no classifier (a matrix `head.weight`) in this checkpoint")
    num_labels, width = state_dict["head.weight"].shape
    # A classifier of another width does not fit anyway, and may claim millions of rows: it gets no names of classes.
    overrides = {"num_labels": num_labels} if width == config.hidden_size else {}
    if config.has_class_token and "layers.0.RC.pos_embed" in state_dict:
        if state_dict["layers.0.RC.pos_embed"].ndim != 3:
            raise ValueError("the position table (`layers.0.RC.pos_embed`) must have three dimensions")
        num_patches = state_dict["layers.0.RC.pos_embed"].shape[1] - 1
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise ValueError(
                f"the position table (`layers.0.RC.pos_embed`) has {num_patches} patches, not a square number"
            )
        overrides["image_size"] = side * config.total_stride
    return config_from_preset(preset, **overrides)


def convert_original_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: ViTAEFamilyConfig | None = None
) -> dict[str, torch.Tensor]:
    """Rename the tensors of an original state dict and split fused projections.

    Nothing is resized, and nothing is left out but ViTAEv2's `relative_position_index`, which no network reads.

    Args:
        state_dict: tensors by the authors' names, with or without `module.` before them.
        config: of the network; default: recognised by [`config_from_original`].

    Returns:
        The state dict of a classifier with that configuration.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; the message names the first ten.
    """
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items() if IGNORED not in name}
    config = config or config_from_original(state_dict)
    layout = original_layout(config)
    problems = [f"missing: {name}" for name in layout if name not in state_dict]
    problems += [f"not expected: {printable(name)}" for name in state_dict if name not in layout]
    converted = {}
    for original, parts in layout.items():
        if original not in state_dict:
            continue
        shape = next(iter(parts.values()))
        expected = (len(parts) * shape[0], *shape[1:]) if shape else ()
        if tuple(state_dict[original].shape) != tuple(expected):
            problems.append(
                f"wrong shape: {original} is {tuple(state_dict[original].shape)}, expected {tuple(expected)}"
            )
            continue
        tensors = state_dict[original].chunk(len(parts)) if len(parts) > 1 else [state_dict[original]]
        converted.update({name: tensor.clone() for name, tensor in zip(parts, tensors)})
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit this network:\n  " + listed(problems, "\n  "))
    return converted


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of one of the authors' `.pth` or `.pth.tar` files without running code from it.

    Takes `state_dict_ema` if there is one, else `state_dict`, `model` or the file itself; drops `module.` prefixes.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no PyTorch file, damaged, asks to run code, or holds no state dict of finite numbers.
    """
    content = read_torch_file(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    is_state_dict = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, (torch.Tensor, NoTensor)) for key, value in content.items()
    )
    if not is_state_dict or not content:
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, at the top or under `state_dict_ema`,"
            " `state_dict` or `model`"
        )
    unusable = {name: problem for name, value in content.items() if (problem := problem_of_weight(value))}
    if unusable:
        names = listed(f"{printable(name)} ({problem})" for name, problem in unusable.items())
        raise ValueError(f"{path} holds what no weight can be: {names}")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def problem_of_weight(value: torch.Tensor | NoTensor) -> str | None:
    """What keeps a value of a state dict from being a weight, if anything does."""
    if isinstance(value, NoTensor):
        return value.problem
    return None if value.isfinite().all() else "not finite"


def read_labels(path: str | Path | None, num_labels: int | None) -> dict[int, str] | None:
    """Class names by index: from a JSON list, or ImageNet-1k's for 1,000 classes; for other heads there are none.

    Raises:
        ValueError: the file is no JSON list of `num_labels` names.
        ImportError: ImageNet's names are needed and timm, which has them, is not installed.
    """
    if path is not None:
        names = json.loads(Path(path).read_text())
        if not isinstance(names, list) or len(names) != num_labels or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{path} must be a JSON list of {num_labels} class names, one for each output of the classifier"
            )
    elif num_labels == 1000:
        try:
            from timm.data import ImageNetInfo
        except ModuleNotFoundError as error:
            sentence = of_a_missing_package(error, "the list of ImageNet's class names")
            raise ImportError(f"{sentence}, or pass --labels") from error
        names = ImageNetInfo("imagenet-1k").label_descriptions()
    else:
        return None
    return dict(enumerate(names))


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    preset: str | None = None,
    labels: str | Path | None = None,
    verify: str | Path | None = None,
) -> dict[str, Any]:
    """Write an original checkpoint as a folder for `from_pretrained` and the Hub, whole or not at all.

    The folder has a model card, unless the network is one that the authors have not published, as `vitae-nano`.

    Args:
        checkpoint: one of the authors' files.
        output: folder to create.
        preset: which network it is; default: recognised from the tensors.
        labels: JSON list of class names; default: ImageNet-1k's for 1,000 classes, else generic ones.
        verify: image to classify with the reloaded folder.

    Returns:
        The folder, and what was found: name and SHA-256 of the file, preset, parameters, labels, whether these are
        ImageNet-1k's, image size, and the labels of the `verify` image.

    Raises:
        ValueError: as [`load_original_checkpoint`], [`convert_original_state_dict`] and [`verify_folder`] say.
        OSError: `output` exists and is not empty, or a file cannot be read or written.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    model, preset = load_original_model(checkpoint, preset, labels)
    record = {
        "output": str(output),
        "file": Path(checkpoint).name,
        "sha256": sha256(Path(checkpoint)),
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_labels": model.config.num_labels,
        "is_imagenet_1k": labels is None and model.config.num_labels == 1000,
        "image_size": model.config.image_size,
    }
    with whole_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        ViTAEImageProcessorPil(size=model.config.image_size).save_pretrained(unfinished)
        if preset in VARIANTS:
            variant_card(preset, output.name, record).save(unfinished / "README.md")
        write_sums(unfinished, sorted(unfinished.iterdir()))
        if verify is not None:
            record["verified"] = verify_folder(unfinished, verify)
    return record


def load_original_model(
    checkpoint: str | Path, preset: str | None = None, labels: str | Path | None = None
) -> tuple[PreTrainedModel, str]:
    """A classifier with the weights of an original checkpoint, and its preset's name; see [`convert_checkpoint`]."""
    state_dict = load_original_checkpoint(checkpoint)
    preset = preset or detect_preset(state_dict)
    config = config_from_original(state_dict, preset)
    if id2label := read_labels(labels, config.num_labels):
        config.id2label, config.label2id = id2label, {name: index for index, name in id2label.items()}
    # Before the model is built: what does not fit may describe one of any size.
    weights = convert_original_state_dict(state_dict, config)
    model = AutoModelForImageClassification.from_config(config)
    model.load_state_dict(weights)
    return model, preset


@torch.no_grad()
def verify_folder(folder: str | Path, image: str | Path) -> list[dict[str, Any]]:
    """Reload a written folder as its users do and classify one image.

    Returns:
        The five likeliest, as `pipeline` gives them: `{"label": …, "score": …}`.

    Raises:
        ValueError: a logit is not finite, or the image cannot be read.
    """
    model, processor = load_trained(folder, dtype="auto")
    logits = model(processor(image, return_tensors="pt").pixel_values).logits[0]
    if not logits.isfinite().all():
        raise ValueError(f"the converted network gives logits that are not finite for {image}")
    scores, indices = logits.softmax(-1).topk(min(5, logits.numel()))
    return [
        {"label": label_names(model.config)[index], "score": round(score, 4)}
        for score, index in zip(scores.tolist(), indices.tolist())
    ]
