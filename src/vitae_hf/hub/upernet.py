# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A whole UperNet out of a run of mmsegmentation: the heads beside a backbone, by the names that they have there."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..heads_vitae import UperNetConfig


PATTERNS = [  # of our names of a head's tensors, and what mmsegmentation writes for them
    (r"\.batch_norm\.", ".bn."),
    (r"_head\.classifier\.", "_head.conv_seg."),
]
# What no decode head but UperNet's has all of.
MARKS = tuple(f"decode_head.{name}.weight" for name in ("psp_modules.0.1.conv", "fpn_bottleneck.conv", "conv_seg"))


def original_head_name(name: str) -> str:
    """mmsegmentation's name of our tensor `name` of a head."""
    for pattern, replacement in PATTERNS:
        name = re.sub(pattern, replacement, name)
    return name


def find_heads(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """The tensors of the heads of a UperNet: their names in the state dict, and without what is before them.

    An auxiliary head, which only training needs, is not among them if it is of another kind than the library's.

    Args:
        prefix: of the backbone beside them, such as `backbone.`.
    """
    if not prefix.endswith("backbone."):
        return {}
    outer = prefix.removesuffix("backbone.")
    heads = {name: name.removeprefix(outer) for name in state_dict if name.startswith(outer)}
    heads = {name: own for name, own in heads.items() if re.match(r"(?:decode|auxiliary)_head\.", own)}
    if not set(MARKS) <= set(heads.values()):
        return {}
    first, last = (state_dict.get(f"{outer}auxiliary_head.{name}.weight") for name in ("convs.0.conv", "conv_seg"))
    labels = state_dict[f"{outer}decode_head.conv_seg.weight"].shape[:1]
    if first is None or last is None or first.shape[2:] != (3, 3) or last.shape[:1] != labels:
        heads = {name: own for name, own in heads.items() if own.startswith("decode_head.")}
    return heads


def upernet_config(heads: Mapping[str, torch.Tensor], backbone: Any) -> PreTrainedConfig:
    """The configuration of a UperNet whose heads have these tensors, by mmsegmentation's names.

    Raises:
        ValueError: a classifier or a convolution by which it is told is none, or the classifier does not fit.
    """
    for name in MARKS:
        if heads[name].ndim != 4:
            raise ValueError(f"`{name}` must be the weight of a convolution, and has {heads[name].ndim} dimensions")
    _, width, classifier = (heads[name] for name in MARKS)
    if len(classifier) < 2 or classifier.shape[1] != len(width):
        raise ValueError(
            f"`{MARKS[2]}` must have at least two classes, from {len(width)} channels, and has the shape"
            f" {tuple(classifier.shape)}; --head drop leaves the heads of the UperNet aside"
        )
    if not backbone.is_plain:  # the maps of a plain one are its feature pyramid's already
        backbone.out_features = backbone.stage_names[1:]
    layers = {match[1] for name in heads if (match := re.match(r"auxiliary_head\.convs\.(\d+)\.", name))}
    fields: dict[str, Any] = {"use_auxiliary_head": bool(layers)}
    if layers:
        fields |= {"auxiliary_num_convs": len(layers)}
        fields |= {"auxiliary_channels": len(heads["auxiliary_head.convs.0.conv.weight"])}
        fields["auxiliary_concat_input"] = any(name.startswith("auxiliary_head.conv_cat.") for name in heads)
    return UperNetConfig(backbone_config=backbone, hidden_size=len(width), num_labels=len(classifier), **fields)


def picture_side(config: Any) -> int:
    """The shorter side, in pixels, of pictures for a UperNet: that of its positions, or the 512 of most recipes."""
    return config.backbone_config.image_size if config.backbone_config.is_plain else 512


def class_names(content: Any) -> list[str] | None:
    """The names of the classes that a run of mmsegmentation saves beside its weights."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    data = meta.get("dataset_meta")
    data = {str(key).lower(): value for key, value in data.items()} if isinstance(data, Mapping) else {}
    names = meta.get("CLASSES") or data.get("classes")
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) and name for name in names):
        return None
    return list(names)
