# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE: a vision transformer whose cells run attention and convolution in parallel.

The shape key and what it shares with ViTAEv2 are in `layers_vitae.py`; this file has the random-feature attention, the
class token, and the models, from leaf to head.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vitae import ViTAEConfig
from .layers_vitae import (
    ViTAEAttention,
    ViTAEFamilyBackbone,
    ViTAEFamilyNormalCell,
    ViTAEFamilyPreTrainedModel,
    ViTAEFamilyReductionCell,
    ViTAENormalConvBranch,
    ViTAEPyramidReduction,
    ViTAEReductionConvBranch,
    map_to_tokens,
    pyramid_size,
    tokens_to_map,
)


def softmax_kernel_log_features(states: torch.Tensor, random_projection: torch.Tensor) -> torch.Tensor:
    """Logarithm of the positive random features of the softmax kernel, but for the constant -log(M)/2.

    With w the rows of `random_projection`, exp(q·k) is the mean over w of exp(w·q - |q|²/2) exp(w·k - |k|²/2).

    Args:
        states: queries or keys `(B, N, C)`.
        random_projection: `(M, C)`.

    Returns:
        `(B, N, M)`: w·x - |x|²/2.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1.
    """
    return states @ random_projection.T - states.square().sum(-1, keepdim=True) / 2


def random_feature_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, random_projection: torch.Tensor, eps: float = 1e-8
) -> torch.Tensor:
    """Attention with the softmax kernel replaced by its random-feature estimate, in time linear in N.

    Computes φ(q)·(φ(k)ᵀ v) / (φ(q)·Σφ(k) + eps) for the features φ = exp(log features)/√M. Each exponential is taken
    relative to its largest value, and the shifts, which cancel in the quotient, are moved into `eps`: the result is the
    same, and neither large nor small activations overflow or divide by zero. Everything is float32, under autocast too.

    Args:
        query, key: `(B, N, C)`, not scaled.
        value: `(B, N, C)`.
        random_projection: `(M, C)`.
        eps: what the denominator is increased by.

    Returns:
        `(B, N, C)` in the dtype of `value`.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", equation 4.
    """
    with maybe_autocast(device_type=value.device.type, enabled=False):
        projection = random_projection.float()
        query_logs = softmax_kernel_log_features(query.float(), projection)
        key_logs = softmax_kernel_log_features(key.float(), projection)
        query_shift = query_logs.detach().amax(-1, keepdim=True)  # (B, N, 1)
        key_shift = key_logs.detach().amax((-2, -1), keepdim=True)  # (B, 1, 1)
        query_features, key_features = (query_logs - query_shift).exp(), (key_logs - key_shift).exp()
        # Within these bounds eps stays a normal float32, outside of them it decides nothing.
        shifted_eps = eps * projection.shape[0] * (-query_shift - key_shift).clamp(-60, 80).exp()
        numerator = query_features @ (key_features.transpose(1, 2) @ value.float())
        denominator = query_features @ key_features.sum(1).unsqueeze(-1) + shifted_eps
        return (numerator / denominator).to(value.dtype)


class ViTAERandomFeatureAttention(nn.Module):
    """Single-head attention with random features and a value residual; the widths of input and output differ.

    The value is the residual because the input is wider than the output. `random_projection` (M, C), M = C/2, is drawn
    once and never trained, but saved, since the weights around it were trained for it.
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        in_size, hidden_size = pyramid_size(config, stage_idx), config.hidden_sizes[stage_idx]
        self.q_proj = nn.Linear(in_size, hidden_size)
        self.k_proj = nn.Linear(in_size, hidden_size)
        self.v_proj = nn.Linear(in_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.reduction_dropout_prob)
        self.register_buffer("random_projection", torch.empty(hidden_size // 2, hidden_size))

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> tuple[torch.Tensor, None]:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attention = random_feature_attention(query, key, value, self.random_projection)
        return value + self.dropout(self.o_proj(attention)), None


class ViTAEReductionCell(ViTAEFamilyReductionCell):
    """The reduction cell with random-feature attention: (B, Cin, H·s, W·s) -> (B, N, C)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__(
            config,
            stage_idx,
            attention=ViTAERandomFeatureAttention(config, stage_idx),
            conv_branch=ViTAEReductionConvBranch(config, stage_idx),
            dropout_prob=config.reduction_dropout_prob,
        )


class ViTAENormalCell(ViTAEFamilyNormalCell):
    """The normal cell with attention of all tokens to all: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int, cell_idx: int):
        hidden_size, num_heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
        super().__init__(
            config,
            stage_idx,
            cell_idx,
            attention=ViTAEAttention(config, hidden_size, hidden_size, num_heads),
            conv_branch=ViTAENormalConvBranch(config, stage_idx, config.conv_branch_depth, config.conv_kernel_size),
        )


class ViTAEEmbeddings(nn.Module):
    """Patches, class token and learned positions of the class-token variants: (B, Cin, H·s, W·s) -> (B, 1 + N, C)."""

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        hidden_size, stride = config.hidden_sizes[0], config.strides[0]
        height, width = config.image_height_width
        self.image_size = config.image_height_width
        self.grid_size = (height // stride, width // stride)
        self.projection = nn.Conv2d(config.num_channels, hidden_size, stride, stride=stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def interpolate_pos_encoding(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Positions for another grid, as ViT resamples them (bicubic, no antialiasing), the class token's kept."""
        if not torch.compiler.is_exporting() and grid_size == self.grid_size:  # an exported program serves all sizes
            return self.position_embeddings
        class_position, positions = self.position_embeddings.split([1, self.position_embeddings.shape[1] - 1], dim=1)
        grid = tokens_to_map(positions.float(), *self.grid_size)
        grid = nn.functional.interpolate(grid, size=grid_size, mode="bicubic", align_corners=False)
        return torch.cat([class_position, map_to_tokens(grid).to(class_position.dtype)], dim=1)

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Make another image size the one that positions are learned for."""
        stride = self.projection.stride[0]
        grid_size = (image_size[0] // stride, image_size[1] // stride)
        self.position_embeddings = nn.Parameter(self.interpolate_pos_encoding(grid_size).clone())
        self.image_size, self.grid_size = image_size, grid_size

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        patches = self.projection(pixel_values)  # (B, C, H, W)
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(tuple(patches.shape[-2:]))
        elif (height, width) == self.image_size:
            positions = self.position_embeddings
        else:
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({self.image_size[0]}*{self.image_size[1]})."
                " Pass `interpolate_pos_encoding=True` to interpolate the position embeddings."
            )
        class_tokens = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        return torch.cat([class_tokens, map_to_tokens(patches)], dim=1) + positions


class ViTAEStage(nn.Module):
    """One reduction cell, then the normal cells: (B, Cin, H·s, W·s) -> (B, C, H, W).

    In the class-token variants the embeddings stand for the reduction cell, and tokens (B, 1 + N, C) go in and out.
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        reduction_cells = {"random_feature": ViTAEReductionCell, "pyramid": ViTAEPyramidReduction}
        self.reduction_cell = None
        if not config.has_class_token:
            self.reduction_cell = reduction_cells[config.reduction_types[stage_idx]](config, stage_idx)
        self.normal_cells = nn.ModuleList(
            ViTAENormalCell(config, stage_idx, cell_idx) for cell_idx in range(config.depths[stage_idx])
        )

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> torch.Tensor:
        if self.reduction_cell is not None:
            hidden_states = self.reduction_cell(hidden_states, **kwargs)  # (B, N, C)
        for normal_cell in self.normal_cells:
            hidden_states = normal_cell(hidden_states, height, width, **kwargs)
        return hidden_states if self.reduction_cell is None else tokens_to_map(hidden_states, height, width)


class ViTAEPooler(nn.Module):
    """Mean over the tokens of the grid; the class-token variants leave that token out and normalise the mean."""

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        self.num_class_tokens = int(config.has_class_token)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.has_class_token else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pooled = hidden_states[:, self.num_class_tokens :].mean(1)  # (B, C)
        return pooled if self.layernorm is None else self.layernorm(pooled)


class ViTAEPreTrainedModel(ViTAEFamilyPreTrainedModel):
    """Base class: how ViTAE's weights are initialised, loaded, saved and split over devices."""

    config: ViTAEConfig
    base_model_prefix = "vitae"
    _no_split_modules = ["ViTAEEmbeddings", "ViTAEReductionCell", "ViTAEPyramidReduction", "ViTAENormalCell"]
    _keep_in_fp32_modules_strict = ["random_projection"]
    _can_record_outputs = {"hidden_states": ViTAEStage, "attentions": ViTAEAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors': beside the weights of layers, orthogonal random features and zero positions."""
        if isinstance(module, ViTAERandomFeatureAttention):
            init.orthogonal_(module.random_projection, gain=math.sqrt(module.random_projection.shape[0]))
        elif isinstance(module, ViTAEEmbeddings):
            init.zeros_(module.cls_token)
            init.zeros_(module.position_embeddings)
        else:
            super()._init_weights(module)


class ViTAEModel(ViTAEPreTrainedModel):
    """ViTAE without a head: tokens of the last stage and, with the pooling layer, their mean."""

    def __init__(self, config: ViTAEConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = ViTAEEmbeddings(config) if config.has_class_token else None
        self.stages = nn.ModuleList(ViTAEStage(config, stage_idx) for stage_idx in range(config.num_stages))
        self.pooler = ViTAEPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return super().get_input_embeddings() if self.embeddings is None else self.embeddings

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
                Normalised images; both sides are multiples of `config.total_stride`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Class-token variants: interpolate the position table to another size than `config.image_size`. The
                pyramid variants have no positions and take any valid size as it is.
            output_hidden_states (`bool`, *optional*):
                Return `hidden_states`, one entry more than there are stages: the input of the first stage, then the
                output of each. Pyramid variants: the image, then maps `(B, hidden_sizes[i], height/stride,
                width/stride)`. Class-token variants: tokens `(B, 1 + N, C)` after the embeddings and after the cells.
            output_attentions (`bool`, *optional*):
                Return `attentions`, the softmax weights `(B, heads, T, T)` of each normal cell in order; this takes
                `attn_implementation="eager"`. Random-feature cells never form such a matrix and add no entry.
            return_dict (`bool`, *optional*, defaults to `True`):
                `False` gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(B, T, C)`, the tokens of the last stage row by row, the
            class token first where there is one; `pooler_output` `(B, C)`, what the classifier reads.

        Raises:
            ValueError: the shape of `pixel_values` is not as above.
        """
        self.validate_pixel_values(pixel_values)
        height, width = pixel_values.shape[-2:]
        hidden_states = pixel_values.to(self.get_input_embeddings().dtype)
        if self.embeddings is not None:
            hidden_states = self.embeddings(hidden_states, interpolate_pos_encoding)
        for stage, stride in zip(self.stages, self.config.strides):
            height, width = height // stride, width // stride
            hidden_states = stage(hidden_states, height, width, **kwargs)
        if self.embeddings is None:
            hidden_states = map_to_tokens(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class ViTAEForImageClassification(ViTAEPreTrainedModel):
    """ViTAE with a linear classifier on the pooled tokens."""

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vitae = ViTAEModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                As in [`ViTAEModel.forward`], like `interpolate_pos_encoding` and the other arguments.
            labels (`torch.Tensor` of shape `(B,)`, or `(B, num_labels)` for multi-label, *optional*):
                What to compute the loss against. `config.problem_type` names the loss; unset, it follows from the
                number of labels and their dtype, as everywhere in transformers.

        Returns:
            `ImageClassifierOutput`: `loss` (with `labels`), `logits` `(B, num_labels)`, and, when asked for,
            `hidden_states` and `attentions`.
        """
        outputs = self.vitae(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ViTAEChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map (B, C, H, W)."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.movedim(1, -1)).movedim(-1, 1)


class ViTAEFeaturePyramid(nn.Module):
    """Maps at strides 4, 8, 16 and 32 from one at stride 16, each by itself: (B, C, H, W) -> four maps (B, E, …).

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", figure 2, simple
    feature pyramid.
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        width, channels = config.hidden_size, config.feature_pyramid_channels
        eps = config.layer_norm_eps
        rescale = {
            4: [
                nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                ViTAEChannelNorm(width // 2, eps=eps),
                nn.GELU(),
                nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
            ],
            8: [nn.ConvTranspose2d(width, width // 2, 2, stride=2)],
            16: [],
            32: [nn.MaxPool2d(2)],
        }
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d({4: width // 4, 8: width // 2}.get(stride, width), channels, 1, bias=False),
                ViTAEChannelNorm(channels, eps=eps),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ViTAEChannelNorm(channels, eps=eps),
            )
            for stride, layers in rescale.items()
        )

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(level(feature_map) for level in self.levels)


class ViTAEBackbone(ViTAEFamilyBackbone, ViTAEPreTrainedModel):
    """ViTAE as a backbone for detection and segmentation.

    The pyramid variants give maps of strides 4, 8 and 16. The class-token variants give one of stride 16 and, if the
    configuration has `feature_pyramid_channels`, ViTDet's four maps (`"p2"` to `"p5"`, strides 4 to 32) made from it.
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.vitae = ViTAEModel(config, add_pooling_layer=False)
        self.size_divisor = config.total_stride
        self.feature_pyramid = None
        self.num_features = [config.num_channels, *config.hidden_sizes]
        if config.has_class_token:
            self.num_features = [config.hidden_size] * 2
        if config.feature_pyramid_channels is not None:
            self.feature_pyramid = ViTAEFeaturePyramid(config)
            self.num_features += [config.feature_pyramid_channels] * len(self.feature_pyramid.levels)
            self.size_divisor = 2 * config.total_stride
        self.post_init()

    def feature_maps_of(self, hidden_states: tuple[torch.Tensor, ...], image_size: torch.Size) -> tuple:
        if not self.config.has_class_token:
            return hidden_states
        height, width = (side // self.config.total_stride for side in image_size)
        maps = tuple(tokens_to_map(tokens[:, 1:], height, width) for tokens in hidden_states)
        return maps if self.feature_pyramid is None else (*maps, *self.feature_pyramid(maps[-1]))

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        return super().forward(pixel_values, **{"interpolate_pos_encoding": True, **kwargs})


ViTAEModel.register_for_auto_class("AutoModel")
ViTAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTAEBackbone.register_for_auto_class("AutoBackbone")

__all__ = ["ViTAEBackbone", "ViTAEForImageClassification", "ViTAEModel", "ViTAEPreTrainedModel"]
