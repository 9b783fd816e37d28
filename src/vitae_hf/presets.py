# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The published variants and some small ones, as differences from the configurations' defaults, which are S."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .configuration_vitae import ViTAEConfig, ViTAEFamilyConfig
from .configuration_vitaev2 import ViTAEv2Config


_TINY = {  # shared by T, 6M and 13M
    "reduction_channels": (64, 64, 128),
    "hidden_sizes": (64, 64, 256),
    "num_attention_heads": (1, 1, 4),
    "conv_groups": (1, 1, 64),
    "mlp_ratio": 2.0,
}
_13M = {
    **_TINY,
    "reduction_channels": (64, 64, 160),
    "hidden_sizes": (64, 64, 320),
    "depths": (0, 0, 11),
    "num_attention_heads": (1, 1, 5),
}


def _plain(hidden_size: int, depth: int, num_heads: int, patch_size: int = 16) -> dict:
    """A plain variant: one stage of square patches and short convolution branches."""
    return {
        "reduction_types": ("patch",),
        "strides": (patch_size,),
        "reduction_kernel_sizes": (patch_size,),
        "reduction_dilations": ((1,),),
        "reduction_channels": (hidden_size,),
        "reduction_conv_groups": (1,),
        "hidden_sizes": (hidden_size,),
        "depths": (depth,),
        "num_attention_heads": (num_heads,),
        "conv_groups": (hidden_size // 4,),
        "conv_branch_depth": 2,
        "mlp_ratio": 4.0,
    }


_VITAE = {
    "vitae-t": {**_TINY, "depths": (0, 0, 7)},
    "vitae-6m": {**_TINY, "depths": (0, 0, 10)},
    "vitae-13m": _13M,  # as released: 10.8M parameters
    "vitae-13m-paper": {**_13M, "conv_groups": (1, 1, 80), "mlp_ratio": 3.0},  # as in the paper: 13.2M
    "vitae-s": {},
    "vitae-b": _plain(768, 12, 12),
    "vitae-l": _plain(1024, 24, 16),
    "vitae-h": _plain(1280, 32, 16),
    "vitae-b-rvsa": {  # for remote sensing: windows that move, scale and turn
        **_plain(768, 12, 12),
        "class_token": False,
        "qkv_bias": False,
        "window_size": 7,
        "window_type": "rotated",
        "global_attn_indexes": (2, 5, 8, 11),
        "use_rel_pos": True,
    },
    "vitae-nano": {  # not published: small enough to train on a CPU
        "image_size": 64,
        "reduction_channels": (16, 16, 32),
        "hidden_sizes": (32, 32, 64),
        "depths": (0, 0, 3),
        "num_attention_heads": (1, 1, 2),
        "conv_groups": (1, 1, 16),
        "mlp_ratio": 2.0,
        "reduction_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "num_labels": 10,
    },
    "vitae-nano-mae": {  # the same, to pretrain as a masked autoencoder
        **_plain(64, 4, 2, patch_size=8),
        "image_size": 64,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
        "num_labels": 10,
    },
}
_VITAEV2: dict[str, dict[str, Any]] = {
    "vitaev2-s": {},
    "vitaev2-s-rsp": {"window_padding": "end", "num_labels": 51},  # for remote sensing; MillionAID has 51 classes
    "vitaev2-48m": {
        "reduction_channels": (64, 64, 192, 384),
        "hidden_sizes": (96, 192, 384, 768),
        "depths": (2, 2, 11, 2),
    },
    "vitaev2-b": {
        "reduction_channels": (96, 96, 256, 512),
        "reduction_num_attention_heads": (1, 1, 4, 8),
        "hidden_sizes": (128, 256, 512, 1024),
        "depths": (2, 2, 12, 2),
        "num_attention_heads": (1, 4, 8, 16),
    },
    "vitaev2-nano": {  # not published: small enough to train on a CPU
        "image_size": 64,
        "reduction_channels": (16, 16, 16, 32),
        "reduction_conv_groups": (1, 4, 8, 16),
        "reduction_num_attention_heads": (1, 1, 1, 2),
        "hidden_sizes": (16, 24, 32, 64),
        "depths": (1, 1, 2, 1),
        "num_attention_heads": (1, 1, 2, 4),
        "window_sizes": (4, 4, None, None),
        "conv_groups": (1, 6, 8, 16),
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "num_labels": 10,
    },
}
PRESETS: dict[str, dict[str, Any]] = {**_VITAE, **_VITAEV2}
"""For each variant the fields in which its configuration differs from the defaults. Without `num_labels` it has 1,000
labels."""


def _closest(name: str, names: Iterable[str]) -> str:
    matches = get_close_matches(name, list(names), n=1, cutoff=0)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def config_from_preset(name: str, **overrides: Any) -> ViTAEFamilyConfig:
    """The configuration of a published variant.

    Args:
        name: one of `PRESETS`, such as `"vitae-s"`.
        **overrides: values for fields, which replace those of the preset, such as `num_labels=10` or `image_size=384`.

    Returns:
        A [`ViTAEConfig`] or [`ViTAEv2Config`]. It has 1,000 labels, for the classes of ImageNet-1k, unless the preset
        or `overrides` say otherwise.

    Raises:
        ValueError: there is no such preset or field (the message names the closest), or no network has such a value.
    """
    if name not in PRESETS:
        closest = _closest(str(name).lower(), PRESETS)
        raise ValueError(f"unknown preset {name!r}{closest} Presets: {', '.join(PRESETS)}.")
    config_class = ViTAEv2Config if name in _VITAEV2 else ViTAEConfig
    known = {field.name.removeprefix("_") for field in fields(config_class)} | {"num_labels", "attn_implementation"}
    for field in overrides:
        if field not in known:
            raise ValueError(f"{config_class.__name__} has no field {field!r}{_closest(field, known)}")
    preset = {"num_labels": 1000, **PRESETS[name]}
    if "id2label" in overrides or "label2id" in overrides:
        del preset["num_labels"]
    try:
        return config_class(**{**preset, **overrides})
    except StrictDataclassError as error:
        raise ValueError(f"preset {name!r} with {overrides}: {error}") from error
