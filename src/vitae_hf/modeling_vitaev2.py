# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAEv2: four stages of ViTAE's cells, with attention inside windows where the maps are large.

What it shares with ViTAE is in `attention_vitae.py`, `layers_vitae.py` (with the shape key) and
`modeling_base_vitae.py`.

Source: Zhang et al. 2022, "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and
Beyond", arXiv 2202.10108.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_vitae import ViTAEAttention
from .configuration_vitaev2 import ViTAEv2Config
from .layers_vitae import (
    ViTAEFamilyNormalCell,
    ViTAEFamilyReductionCell,
    ViTAENormalConvBranch,
    ViTAEReductionConvBranch,
    channels_last,
    map_to_tokens,
    pyramid_size,
    tokens_to_map,
)
from .modeling_base_vitae import (
    ViTAEFamilyBackbone,
    ViTAEFamilyForImageClassification,
    ViTAEFamilyForMaskedImageModeling,
    ViTAEFamilyPreTrainedModel,
    without_mask,
)


class ViTAEv2ReductionCell(ViTAEFamilyReductionCell):
    """The reduction cell with softmax attention: (B, Cin, H·s, W·s) -> (B, N, C).

    In stages with windows this is the usual attention. In the others its queries, keys and values have no bias, and the
    value is added to the output. There is no dropout.
    """

    def __init__(self, config: ViTAEv2Config, stage_idx: int):
        window_size = config.window_sizes[stage_idx]
        attention = ViTAEAttention(
            config,
            pyramid_size(config, stage_idx),
            config.hidden_sizes[stage_idx],
            config.reduction_num_attention_heads[stage_idx],
            qkv_bias=window_size is not None,
            window_size=window_size,
            window_padding=config.window_padding,
            value_residual=window_size is None,
            has_dropout=False,
        )
        conv_branch = ViTAEReductionConvBranch(config, stage_idx, first_norm=True, last_act=False)
        super().__init__(config, stage_idx, attention, conv_branch, dropout_prob=0.0)


class ViTAEv2NormalCell(ViTAEFamilyNormalCell):
    """The normal cell with attention in windows or over all tokens: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: ViTAEv2Config, stage_idx: int, cell_idx: int):
        hidden_size, num_heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
        attention = ViTAEAttention(
            config,
            hidden_size,
            hidden_size,
            num_heads,
            window_size=config.window_sizes[stage_idx],
            window_padding=config.window_padding,
        )
        conv_branch = ViTAENormalConvBranch(config, stage_idx, last_act=False)
        super().__init__(config, stage_idx, cell_idx, attention, conv_branch)


class ViTAEv2Stage(nn.Module):
    """One reduction cell, then the normal cells: (B, Cin, H·s, W·s) -> (B, C, H, W)."""

    def __init__(self, config: ViTAEv2Config, stage_idx: int):
        super().__init__()
        self.reduction_cell: ViTAEv2ReductionCell = ViTAEv2ReductionCell(config, stage_idx)
        self.normal_cells: nn.ModuleList = nn.ModuleList(
            ViTAEv2NormalCell(config, stage_idx, cell_idx) for cell_idx in range(config.depths[stage_idx])
        )

    def forward(self, feature_map: torch.Tensor, height: int, width: int, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.reduction_cell(feature_map, **kwargs)  # (B, N, C)
        for normal_cell in self.normal_cells:
            hidden_states = normal_cell(hidden_states, height, width, **kwargs)
        return tokens_to_map(hidden_states, height, width)


class ViTAEv2PreTrainedModel(ViTAEFamilyPreTrainedModel):
    """Base class: how ViTAEv2's weights are initialised, loaded, saved and split over devices."""

    config: ViTAEv2Config
    base_model_prefix = "vitaev2"
    # The pyramid in a reduction cell is listed too, since accelerate shards input embeddings as a unit of their own.
    _no_split_modules = ["ViTAEv2ReductionCell", "ViTAEPyramidReduction", "ViTAEv2NormalCell"]
    _can_record_outputs = {"hidden_states": ViTAEv2Stage, "attentions": ViTAEAttention}


class ViTAEv2Model(ViTAEv2PreTrainedModel):
    """ViTAEv2 without a head. It gives the tokens of the last stage and their mean."""

    def __init__(self, config: ViTAEv2Config):
        super().__init__(config)
        self.stages: nn.ModuleList = nn.ModuleList(
            ViTAEv2Stage(config, stage_idx) for stage_idx in range(config.num_stages)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Normalised images; both sides are multiples of `config.total_stride`, 32.
            interpolate_pos_encoding (`bool`, *optional*):
                Changes nothing, since ViTAEv2 has no positions and takes any valid size. ViTAE's models have it too.
            output_hidden_states (`bool`, *optional*):
                Return `hidden_states`: the image, then the map `(B, hidden_sizes[i], height/stride, width/stride)` of
                each stage, at strides 4, 8, 16 and 32.
            output_attentions (`bool`, *optional*):
                Return `attentions`, the softmax weights of every cell in order, the reduction cell of a stage first:
                `(B, heads, N, N)`. With attention in windows, `(B · windows, heads, size², size²)`, windows row by row.
                This takes `attn_implementation="eager"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                `False` gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(B, N, C)`, the tokens of the last stage row by row;
            `pooler_output` `(B, C)`, their mean, which the classifier reads.

        Raises:
            ValueError: the shape of `pixel_values` is not as above.
        """
        pixel_values, others = self.validate_pixel_values(pixel_values), without_mask({**kwargs})
        height, width = pixel_values.shape[-2:]
        feature_map = channels_last(pixel_values.to(self.get_input_embeddings().dtype))
        for stage, stride in zip(self.stages, self.config.strides):
            height, width = height // stride, width // stride
            feature_map = stage(feature_map, height, width, **others)
        hidden_states = map_to_tokens(feature_map)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(1))


class ViTAEv2ForImageClassification(ViTAEFamilyForImageClassification, ViTAEv2PreTrainedModel):
    """ViTAEv2 with a linear classifier on the mean of its tokens."""

    config: ViTAEv2Config

    def __init__(self, config: ViTAEv2Config):
        super().__init__(config)
        self.num_labels: int | None = config.num_labels
        self.vitaev2: ViTAEv2Model = ViTAEv2Model(config)
        self.classifier: nn.Module = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.post_init()


class ViTAEv2ForMaskedImageModeling(ViTAEFamilyForMaskedImageModeling, ViTAEv2PreTrainedModel):
    """ViTAEv2 with a linear decoder that predicts the pixels of masked patches, to learn from images without labels."""

    config: ViTAEv2Config

    def __init__(self, config: ViTAEv2Config):
        super().__init__(config)
        self.vitaev2: ViTAEv2Model = ViTAEv2Model(config)
        self.post_init()


class ViTAEv2Backbone(ViTAEFamilyBackbone, ViTAEv2PreTrainedModel):
    """ViTAEv2 as a backbone for detection and segmentation, with maps of strides 4, 8, 16 and 32."""

    config: ViTAEv2Config

    def __init__(self, config: ViTAEv2Config):
        super().__init__(config)
        self.vitaev2: ViTAEv2Model = ViTAEv2Model(config)
        self.size_divisor: int = config.total_stride
        self.num_features: list[int] = [config.num_channels, *config.hidden_sizes]
        self.post_init()
        self.train(self.training)  # freezes the first `frozen_stages` stages


ViTAEv2Model.register_for_auto_class("AutoModel")
ViTAEv2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTAEv2ForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ViTAEv2Backbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "ViTAEv2Backbone",
    "ViTAEv2ForImageClassification",
    "ViTAEv2ForMaskedImageModeling",
    "ViTAEv2Model",
    "ViTAEv2PreTrainedModel",
]
