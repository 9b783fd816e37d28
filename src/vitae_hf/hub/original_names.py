# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' names of tensors, and the names of ours that each of their tensors holds."""

import re
from typing import Any

import torch
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..heads_vitae import UperNetForSemanticSegmentation
from .upernet import original_head_name


AutoClass = type[_BaseAutoModelClass]

_BOTH = [
    (r"^classifier\.", "head."),
    (r"^vitae(?:v2)?\.stages\.(\d+)\.reduction_cell\.", r"layers.\1.RC."),
    (r"^vitae(?:v2)?\.stages\.(\d+)\.normal_cells\.", r"layers.\1.NC."),
    # reduction cell
    (r"(RC)\.(?:pyramid_reduction\.)?convs\.(\d+)\.", r"\1.PRM.convs.\2.0."),
    (r"(RC)\.layernorm_before\.", r"\1.attn.norm1."),
    (r"(RC)\.layernorm_after\.", r"\1.attn.norm2."),
    # normal cell
    (r"(NC\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(NC\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(NC\.\d+)\.attention\.[qkv]_proj\.", r"\1.attn.qkv."),
    (r"(NC\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
]
_CONV_BRANCH = [  # of a normal cell, and of ViTAEv2's reduction cell
    (r"\.conv_branch\.0\.conv\.", ".PCM.0."),
    (r"\.conv_branch\.0\.norm\.", ".PCM.1."),
    (r"\.conv_branch\.1\.conv\.", ".PCM.3."),
    (r"\.conv_branch\.1\.norm\.", ".PCM.4."),
    (r"\.conv_branch\.2\.conv\.", ".PCM.6."),
]
# By model type: patterns of our tensor names, and what the authors write for them. All are applied, in this order.
PATTERNS = {
    "vitae": [
        *_BOTH,
        (r"^vitae\.pooler\.layernorm\.", "fc_norm."),
        (r"^vitae\.embeddings\.projection\.", "layers.0.RC.PRM.proj."),
        (r"^vitae\.embeddings\.cls_token$", "layers.0.RC.cls_token"),
        (r"^vitae\.embeddings\.position_embeddings$", "layers.0.RC.pos_embed"),
        (r"(RC)\.attention\.random_projection$", r"\1.attn.w"),
        (r"(RC)\.attention\.[qkv]_proj\.", r"\1.attn.kqv."),
        (r"(RC)\.attention\.o_proj\.", r"\1.attn.proj."),
        (r"(RC)\.mlp\.fc1\.", r"\1.attn.mlp.0."),
        (r"(RC)\.mlp\.fc2\.", r"\1.attn.mlp.2."),
        (r"(RC)\.conv_branch\.0\.conv\.", r"\1.PCM.0."),
        (r"(RC)\.conv_branch\.1\.conv\.", r"\1.PCM.2."),
        (r"(RC)\.conv_branch\.1\.norm\.", r"\1.PCM.3."),
        (r"(RC)\.conv_branch\.2\.conv\.", r"\1.PCM.5."),
        *_CONV_BRANCH,
    ],
    "vitaev2": [
        *_BOTH,
        (r"(RC)\.attention\.[qkv]_proj\.", r"\1.attn.attn.qkv."),
        (r"(RC)\.attention\.o_proj\.", r"\1.attn.attn.proj."),
        (r"(RC)\.mlp\.", r"\1.attn.mlp."),
        *_CONV_BRANCH,
    ],
}


BLOCKS = [  # after those of "vitae": masked autoencoders, and networks with windows, call their tensors otherwise
    (r"^layers\.0\.RC\.PRM\.", "patch_embed."),
    (r"^layers\.0\.RC\.", ""),
    (r"^layers\.2\.NC\.", "blocks."),
    (r"^(?:feature_pyramid\.|fc_)?(?:layer)?norm\.", "norm."),
    (r"\.attention\.relative_positions\.", ".attn."),
    (r"\.attention\.relative_position_bias$", ".attn.relative_position_bias_table"),
    (r"\.attention\.([kv])(?:ey|alue)_windows\.(\w+)\.", r".attn.sampling_\2_\1.2."),
    (r"^feature_pyramid\.levels\.0\.1\.", "fpn1.1.ln."),
    (r"^feature_pyramid\.levels\.0\.", "fpn1."),
    (r"^feature_pyramid\.levels\.1\.", "fpn2."),
    (r"^decoder\.embedding\.", "decoder_embed."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.position_embeddings$", "decoder_pos_embed"),
    (r"^decoder\.layers\.", "decoder_blocks."),
    (r"^decoder\.layernorm\.", "decoder_norm."),
    (r"^decoder\.prediction\.", "decoder_pred."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
]


def new_model(config: Any, auto_class: AutoClass) -> PreTrainedModel:
    """A network with random weights: by its Auto class, but a UperNet as this package saves it."""
    is_upernet = auto_class is AutoModelForSemanticSegmentation
    return UperNetForSemanticSegmentation(config) if is_upernet else auto_class.from_config(config)


def original_name(name: str, config: Any, auto_class: AutoClass = AutoModelForImageClassification) -> str:
    """The authors' name of the tensor that holds our tensor `name` of a network with this configuration.

    Args:
        auto_class: of the model with that tensor; a base model's has the base model's name before it.
    """
    if auto_class is AutoModelForSemanticSegmentation:
        own = name.removeprefix("backbone.")
        return original_head_name(name) if own == name else original_name(own, config.backbone_config, AutoBackbone)
    if config.is_plain:  # the authors write these as three stages, of which the last alone has normal cells
        name = name.replace("vitae.stages.0.", "vitae.stages.2.")
    for pattern, replacement in PATTERNS[config.model_type]:
        name = re.sub(pattern, replacement, name)
    has_blocks = auto_class is AutoModelForPreTraining or (config.is_plain and not config.has_class_token)
    for pattern, replacement in BLOCKS if has_blocks else ():
        name = re.sub(pattern, replacement, name)
    if has_blocks and config.window_type == "rotated":  # keys and values have the same windows, without a letter
        name = name.replace("_k.2.", ".2.")
    return name


def original_layout(
    config: Any, auto_class: AutoClass = AutoModelForImageClassification
) -> dict[str, dict[str, torch.Size]]:
    """What an original checkpoint of a network holds.

    Args:
        auto_class: of the network: a classifier, what is in front of one, a masked autoencoder or a UperNet.

    Returns:
        By the authors' name of a tensor: our names and shapes of the tensors in it. Where there are several, as in a
        fused projection, they are stacked in this order along the first axis.
    """
    with torch.device("meta"):
        model: Any = new_model(config, auto_class)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix and model.base_model is model else ""
    layout: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        layout.setdefault(original_name(f"{prefix}{name}", config, auto_class), {})[name] = tensor.shape
    for original, parts in layout.items():
        if fused := re.search(r"\.(kqv|qkv)\.", original):
            order = [f"{letter}_proj" for letter in fused.group(1)]
            layout[original] = dict(sorted(parts.items(), key=lambda part: order.index(part[0].split(".")[-2])))
    return layout
