# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE: a vision transformer whose cells run attention and convolution in parallel.

From leaf to head: its cells, stages, and models. What it shares with
ViTAEv2 is in `attention_vitae.py`, `layers_vitae.py` (with the shape key) and `modeling_base_vitae.py`.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348.
"""

import copy
import math
import re
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_vitae import ViTAEAttention, ViTAERandomFeatureAttention, ViTAERelativePositions
from .configuration_vitae import ViTAEConfig
from .decoder_vitae import ViTAEDecoder, masked_patch_loss, random_mask
from .embeddings_vitae import ViTAEEmbeddings, sin_cos_positions
from .layers_vitae import (
    ViTAEFamilyNormalCell,
    ViTAEFamilyReductionCell,
    ViTAENormalConvBranch,
    ViTAEPyramidReduction,
    ViTAEReductionConvBranch,
    channels_last,
    grid_tokens,
    map_to_tokens,
    tokens_to_map,
)
from .modeling_base_vitae import (
    ViTAEFamilyBackbone,
    ViTAEFamilyForImageClassification,
    ViTAEFamilyForMaskedImageModeling,
    ViTAEFamilyPreTrainedModel,
    without_mask,
)
from .rotated_windows_vitae import ViTAERotatedWindowAttention


HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONV_BRANCH_WEIGHT = re.compile(r"normal_cells\.\d+\.conv_branch\.\d+\.conv\.weight$")


def saved_conv_kernel_size(
    source: str | PathLike[str] | None,
    config: PreTrainedConfig | str | PathLike[str] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> int | None:
    """The kernel size of the weights that `from_pretrained` is about to load, called with its arguments.

    Returns:
        `None` if it is unknown, or if the configuration that is used tells it anyway.
    """
    if state_dict is not None:
        sizes = (weight.shape[-1] for name, weight in state_dict.items() if CONV_BRANCH_WEIGHT.search(name))
        return next(sizes, None)
    if source is None or config is None or (isinstance(config, PreTrainedConfig) and not config.has_class_token):
        return None
    try:
        hub_keywords = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        return ViTAEConfig.get_config_dict(source, **hub_keywords)[0].get("conv_kernel_size")
    except OSError:  # weights without a configuration
        return None


def with_conv_kernel_size(kwargs: dict[str, Any], size: int) -> dict[str, Any]:
    """The arguments of `from_pretrained` such that the network is built with kernels of this size."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        return {"conv_kernel_size": size, **kwargs}
    config = copy.deepcopy(config)  # so that the caller's is unchanged
    config.conv_kernel_size = size
    return {**kwargs, "config": config}


class ViTAEReductionCell(ViTAEFamilyReductionCell):
    """The reduction cell of type "random_feature", named after its attention: (B, Cin, H·s, W·s) -> (B, N, C)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__(
            config,
            stage_idx,
            attention=ViTAERandomFeatureAttention(config, stage_idx),
            conv_branch=ViTAEReductionConvBranch(config, stage_idx),
            dropout_prob=config.reduction_dropout_prob,
        )


class ViTAEPyramidReductionCell(ViTAEPyramidReduction):
    """The reduction cell of type "pyramid", which is nothing but the pyramid: (B, Cin, H·s, W·s) -> (B, N, C)."""


def normal_attention(config: ViTAEConfig, stage_idx: int, cell_idx: int) -> ViTAEAttention:
    """The attention of a normal cell: over all tokens, or in windows, which may rotate."""
    hidden_size, num_heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
    window_size = None if cell_idx in config.global_attn_indexes else config.window_size
    if window_size is not None and config.window_type != "plain":
        is_apart = config.window_type == "rotated_apart"
        return ViTAERotatedWindowAttention(config, hidden_size, num_heads, window_size, is_apart)
    grid_size = config.grid_size if window_size is None else (window_size, window_size)
    return ViTAEAttention(
        config,
        hidden_size,
        hidden_size,
        num_heads,
        config.qkv_bias,
        window_size,
        config.window_padding,
        rel_pos_size=grid_size if config.use_rel_pos else None,
    )


class ViTAENormalCell(ViTAEFamilyNormalCell):
    """The normal cell: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int, cell_idx: int):
        super().__init__(
            config,
            stage_idx,
            cell_idx,
            attention=normal_attention(config, stage_idx, cell_idx),
            conv_branch=ViTAENormalConvBranch(config, stage_idx, config.conv_branch_depth, config.conv_kernel_size),
        )


def normal_cells(config: ViTAEConfig, stage_idx: int) -> nn.ModuleList:
    return nn.ModuleList(ViTAENormalCell(config, stage_idx, cell_idx) for cell_idx in range(config.depths[stage_idx]))


class ViTAEStage(nn.Module):
    """A stage of a pyramid variant, a reduction cell and normal cells: (B, Cin, H·s, W·s) -> (B, C, H, W)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        cell_classes = {"random_feature": ViTAEReductionCell, "pyramid": ViTAEPyramidReductionCell}
        self.reduction_cell: nn.Module = cell_classes[config.reduction_types[stage_idx]](config, stage_idx)
        self.normal_cells: nn.ModuleList = normal_cells(config, stage_idx)

    def forward(self, feature_map: torch.Tensor, height: int, width: int, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.reduction_cell(feature_map, **kwargs)  # (B, N, C)
        for normal_cell in self.normal_cells:
            hidden_states = normal_cell(hidden_states, height, width, **kwargs)
        return tokens_to_map(hidden_states, height, width)


class ViTAEPlainStage(nn.Module):
    """The only stage of a plain variant, normal cells after the embeddings: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        self.normal_cells: nn.ModuleList = normal_cells(config, stage_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        height: int,
        width: int,
        cell_outputs: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`cell_outputs` gets the output of each cell, if it is given."""
        for normal_cell in self.normal_cells:
            hidden_states = normal_cell(hidden_states, height, width, **kwargs)
            if cell_outputs is not None:
                cell_outputs.append(hidden_states)
        return hidden_states


class ViTAEPooler(nn.Module):
    """Mean over the tokens of the grid, without the class token: (B, T, C) -> (B, C).

    The plain variants normalise the mean.
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        self.has_class_token: bool = config.has_class_token
        self.layernorm: nn.LayerNorm | None = None
        if config.is_plain:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pooled = grid_tokens(hidden_states, self.has_class_token).mean(1)  # (B, C)
        return pooled if self.layernorm is None else self.layernorm(pooled)


class ViTAEPreTrainedModel(ViTAEFamilyPreTrainedModel):
    """Base class: how ViTAE's weights are initialised, loaded, saved and split over devices."""

    config: ViTAEConfig
    base_model_prefix = "vitae"
    # The pyramid in a reduction cell is listed too, since accelerate shards input embeddings as a unit of their own.
    _no_split_modules = [
        "ViTAEEmbeddings",
        "ViTAEReductionCell",
        "ViTAEPyramidReduction",
        "ViTAEPyramidReductionCell",
        "ViTAENormalCell",
        "ViTAEDecoderLayer",
    ]
    _keep_in_fp32_modules_strict = ["random_projection"]
    optional_parts: tuple[str, ...] = (
        *ViTAEFamilyPreTrainedModel.optional_parts,
        "feature_pyramid",
        "layernorm",
        "pooler",
    )
    _can_record_outputs = {"hidden_states": [ViTAEStage, ViTAEPlainStage], "attentions": ViTAEAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation. Besides the layers: orthogonal random features, positions and special tokens."""
        if isinstance(module, ViTAERandomFeatureAttention):
            init.orthogonal_(module.random_projection, gain=math.sqrt(module.random_projection.shape[0]))
        elif isinstance(module, ViTAEEmbeddings) and not module.fixed_positions:
            for table in (module.cls_token, module.position_embeddings):
                if table is not None:
                    init.zeros_(table)
        elif isinstance(module, ViTAERelativePositions):
            init.zeros_(module.rel_pos_h)
            init.zeros_(module.rel_pos_w)
        elif isinstance(module, ViTAERotatedWindowAttention):
            init.trunc_normal_(module.relative_position_bias, std=self.config.initializer_range)
        elif isinstance(module, (ViTAEEmbeddings, ViTAEDecoder)):  # the two tables of fixed positions
            token = module.cls_token if isinstance(module, ViTAEEmbeddings) else module.mask_token
            if token is not None:
                init.normal_(token, std=self.config.initializer_range)
            positions = sin_cos_positions(module.grid_size, module.position_embeddings.shape[-1])
            init.copy_(module.position_embeddings, positions)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Self:
        """[`PreTrainedModel.from_pretrained`]. A masked autoencoder's kernels become 3×3, see [`expand_conv_kernels`].

        `conv_kernel_size=1` leaves them 1×1, except through Auto classes, which do not pass it on.
        """
        if issubclass(cls, ViTAEForPreTraining):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        wanted = kwargs.get("conv_kernel_size")
        if wanted == 3:
            del kwargs["conv_kernel_size"]
        # Weights can only be loaded into a network with kernels of their size, whatever the given configuration says.
        saved = saved_conv_kernel_size(pretrained_model_name_or_path, **kwargs)
        if saved is not None:
            kwargs = with_conv_kernel_size(kwargs, saved)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        if wanted != 1 and model.config.conv_kernel_size == 1:
            model.expand_conv_kernels()
        return loaded

    @torch.no_grad()
    def expand_conv_kernels(self) -> None:
        """Put a border of zeros around the 1×1 kernels of the normal cells' branches, which makes them 3×3 kernels.

        The network computes the same as before, but from now on it can learn to use the neighbours of a token. This is
        how a pretrained masked autoencoder is fine-tuned. `config.conv_kernel_size` becomes 3.

        Raises:
            ValueError: some of the kernels are offloaded and cannot be changed. The model is then unchanged.

        Source: Zhang et al. 2022, ViTAEv2 (arXiv 2202.10108), on scaling ViTAE up.
        """
        cells = [module for module in self.modules() if isinstance(module, ViTAENormalCell)]
        layers: list[Any] = [layer for cell in cells for layer in cell.conv_branch.modules()]
        convs = [layer for layer in layers if getattr(layer, "kernel_size", None) == (1, 1)]  # packed ones too
        if any(conv.weight.is_meta for conv in convs):
            raise ValueError(
                "the 1×1 kernels of a masked autoencoder cannot be made 3×3 while they are offloaded: load the model"
                " without `device_map`, save it, and load what was saved"
            )
        for conv in convs:
            weight = nn.functional.pad(conv.weight, (1, 1, 1, 1))
            conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
            conv.kernel_size, conv.padding = (3, 3), (1, 1)
        self.config.conv_kernel_size = 3


class ViTAEModel(ViTAEPreTrainedModel):
    """ViTAE without a head. It gives the tokens of the last stage and, with the pooling layer, their mean."""

    def __init__(self, config: ViTAEConfig, add_pooling_layer: bool = True, fixed_positions: bool = False):
        super().__init__(config)
        self.embeddings: ViTAEEmbeddings | None = None
        if config.is_plain:
            self.embeddings = ViTAEEmbeddings(config, fixed_positions)
        stage_class = ViTAEPlainStage if config.is_plain else ViTAEStage
        self.stages: nn.ModuleList = nn.ModuleList(
            stage_class(config, stage_idx) for stage_idx in range(config.num_stages)
        )
        self.pooler: ViTAEPooler | None = ViTAEPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        ids_keep: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Normalised images; both sides are multiples of `config.total_stride`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Plain variants: interpolate the tables of positions to another size than `config.image_size`. The
                pyramid variants have no positions and take any valid size as it is.
            ids_keep (`torch.LongTensor` of shape `(B, K)`, *optional*):
                Class-token variants with `conv_kernel_size=1`: the K patches of each image to encode, numbered row by
                row from 0. The network does not see the others. The tokens are then `(B, 1 + K, C)`, in this order.
            output_hidden_states (`bool`, *optional*):
                Return `hidden_states`, one entry more than there are stages: the input of the first stage, then the
                output of each. Pyramid variants: the image, then maps `(B, hidden_sizes[i], height/stride,
                width/stride)`. Plain variants: tokens `(B, T, C)` after the embeddings and after the cells.
            output_attentions (`bool`, *optional*):
                Return `attentions`, the softmax weights `(B, heads, T, T)` of each normal cell in order; this takes
                `attn_implementation="eager"`. Random-feature cells never form such a matrix and add no entry.
            return_dict (`bool`, *optional*, defaults to `True`):
                `False` gives a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(B, T, C)`, the tokens of the last stage row by row, the
            class token first where there is one; `pooler_output` `(B, C)`, what the classifier reads.

        Raises:
            ValueError: the shape of `pixel_values` is not as above, or `ids_keep` is given to another network.
        """
        pixel_values, others = self.validate_pixel_values(pixel_values), without_mask({**kwargs})
        if ids_keep is not None and not (self.config.has_class_token and self.config.conv_kernel_size == 1):
            raise ValueError("`ids_keep` takes a class token and `conv_kernel_size=1`: chosen patches form no grid.")
        pixel_values = channels_last(pixel_values.to(self.get_input_embeddings().dtype))
        if self.config.is_plain:
            hidden_states = self.encode_patches(pixel_values, interpolate_pos_encoding, ids_keep, **others)
        else:
            hidden_states = self.encode_pyramid(pixel_values, **others)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def encode_pyramid(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The pyramid variants: (B, channels, height, width) -> tokens of the last stage (B, N, C)."""
        feature_map, (height, width) = pixel_values, pixel_values.shape[-2:]
        for stage, stride in zip(self.stages, self.config.strides):
            height, width = height // stride, width // stride
            feature_map = stage(feature_map, height, width, **kwargs)
        return map_to_tokens(feature_map)

    def encode_patches(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None,
        ids_keep: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The plain variants: (B, channels, height, width) -> tokens (B, T, C), or of chosen patches (B, 1 + K, C)."""
        hidden_states = self.get_input_embeddings()(pixel_values, interpolate_pos_encoding, ids_keep)
        if ids_keep is None:
            height, width = (side // self.config.total_stride for side in pixel_values.shape[-2:])
        else:
            # The K chosen patches form no grid, but the convolutions need one. Their kernels are 1×1, so that any grid
            # of K places gives the same result.
            height, width = ids_keep.shape[1], 1
        return self.stages[0](hidden_states, height, width, **kwargs)


class ViTAEForImageClassification(ViTAEFamilyForImageClassification, ViTAEPreTrainedModel):
    """ViTAE with a linear classifier on the pooled tokens."""

    config: ViTAEConfig

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.num_labels: int | None = config.num_labels
        self.vitae: ViTAEModel = ViTAEModel(config)
        self.classifier: nn.Module = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.post_init()


class ViTAEForMaskedImageModeling(ViTAEFamilyForMaskedImageModeling, ViTAEPreTrainedModel):
    """ViTAE with a linear decoder that predicts the pixels of masked patches, to learn from images without labels.

    For all variants. Those with a class token have [`ViTAEForPreTraining`] too, whose encoder skips what is masked.
    """

    config: ViTAEConfig

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.vitae: ViTAEModel = ViTAEModel(config, add_pooling_layer=False)
        self.post_init()


@dataclass
class ViTAEForPreTrainingOutput(ModelOutput):
    """What [`ViTAEForPreTraining`] returns, under the names that ViTMAE of transformers has.

    Attributes:
        loss (`torch.Tensor` of shape `()`):
            Mean squared error of the masked patches.
        logits (`torch.Tensor` of shape `(B, N, p² · num_channels)`):
            Predicted pixels of all N patches of side p, row by row, channels innermost. The predictions for visible
            patches mean nothing, since they are not part of the loss.
        mask (`torch.Tensor` of shape `(B, N)`):
            1 for a masked patch, 0 for a visible one.
        ids_restore (`torch.LongTensor` of shape `(B, N)`):
            Position of each patch in the encoder's order, in which all visible patches come before the masked ones.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*):
            Those of the encoder.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None


class ViTAEForPreTraining(ViTAEPreTrainedModel):
    """A class-token variant as a masked autoencoder: it sees a quarter of the patches and predicts the others' pixels.

    Positions are fixed. Kernels are 1×1, since the visible patches form no grid. Other classes can load the encoder
    from a saved folder; there positions are learned, and the kernels become 3×3, which at first compute the same.

    Raises:
        ValueError: the configuration has no class token, other kernels than 1×1, or a width that is no multiple of 4.

    Example:

    ```python
    >>> from vitae_hf import ViTAEForPreTraining, config_from_preset

    >>> model = ViTAEForPreTraining(config_from_preset("vitae-b", conv_kernel_size=1, norm_pix_loss=True))
    ```

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", figure 1; the kernels: Zhang et al.
    2022, ViTAEv2 (arXiv 2202.10108), on scaling ViTAE up.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer averages those of accumulated batches

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        if not config.has_class_token:
            raise ValueError(
                "a masked autoencoder needs a variant with a class token, such as the presets vitae-b, vitae-l,"
                f' vitae-h and vitae-nano-mae; `reduction_types` must be ("patch",), got {config.reduction_types}'
            )
        if config.conv_kernel_size != 1:
            raise ValueError(
                "a masked autoencoder needs 1×1 kernels, since its visible patches form no grid: set"
                f" `conv_kernel_size=1` in the configuration, got {config.conv_kernel_size}"
            )
        if config.hidden_size % 4:
            raise ValueError(f"fixed positions need a width that is a multiple of 4, got {config.hidden_size}")
        self.vitae: ViTAEModel = ViTAEModel(config, add_pooling_layer=False, fixed_positions=True)
        self.layernorm: nn.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder: ViTAEDecoder = ViTAEDecoder(config)
        self.post_init()

    def resize_position_embeddings(self, new_image_size: int | tuple[int, int]) -> None:
        super().resize_position_embeddings(new_image_size)
        self.decoder.resize(self.config.image_height_width)

    def expand_conv_kernels(self) -> None:
        raise ValueError("a masked autoencoder keeps its 1×1 kernels; load the saved folder as another class instead")

    def encode(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        """Features of whole images, of which no patch is masked: (B, num_channels, height, width) -> (B, 1 + N, C).

        The class token comes first, then the N patches row by row, all after the encoder's LayerNorm. The authors' code
        calls this `forward_encoder` with a `mask_ratio` of 0.
        """
        outputs = self.vitae(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.layernorm(outputs.last_hidden_state)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                As in [`ViTAEModel.forward`], like `interpolate_pos_encoding` and the other arguments.
            noise (`torch.Tensor` of shape `(B, N)`, *optional*):
                One number for each patch; the patches with the lowest numbers stay visible. Default: random numbers.

        Returns:
            [`ViTAEForPreTrainingOutput`]; `hidden_states` and `attentions`, when asked for, are those of the visible
            patches.

        Raises:
            ValueError: `noise` has another shape, or `config.mask_ratio` leaves no patch visible, or none masked.
        """
        pixel_values = self.validate_pixel_values(pixel_values)
        height, width = (side // self.config.total_stride for side in pixel_values.shape[-2:])
        shape = (pixel_values.shape[0], height * width)
        if noise is None:
            noise = torch.rand(shape, device=pixel_values.device)
        elif noise.shape != shape:
            raise ValueError(f"`noise` must be (batch, patches), here {shape}; got {tuple(noise.shape)}")
        ids_keep, ids_restore, mask = random_mask(noise, self.config.mask_ratio)
        outputs = self.vitae(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, ids_keep=ids_keep, **kwargs
        )
        logits = self.decoder(self.layernorm(outputs.last_hidden_state), ids_restore, height, width)
        loss = masked_patch_loss(pixel_values, logits, mask, self.config.total_stride, self.config.norm_pix_loss)
        return ViTAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ViTAEChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map (B, C, H, W)."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescaling_layers(widths: tuple[int, int, int], eps: float) -> list[list[nn.Module]]:
    """Layers that make a map 4 and 2 times as large, leave it as it is, and halve it.

    Args:
        widths: of the map, after one doubling, and after two.
        eps: of the LayerNorm between two doublings.
    """
    double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
    width, twice, four_times = widths
    between = [ViTAEChannelLayerNorm(twice, eps=eps), nn.GELU()]
    return [
        [double(width, twice), *between, double(twice, four_times)],
        [double(width, twice)],
        [],
        [nn.MaxPool2d(2)],
    ]


class ViTAEFeaturePyramid(nn.Module):
    """Four maps of E channels made from one: (B, C, H, W) -> 4H×4W, 2H×2W, H×W and H/2×W/2.

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", figure 2, simple
    feature pyramid.
    """

    def __init__(self, config: ViTAEConfig, channels: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        rescaled = rescaling_layers((width, width // 2, width // 4), eps)
        self.levels: nn.ModuleList = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(in_channels, channels, 1, bias=False),
                ViTAEChannelLayerNorm(channels, eps=eps),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ViTAEChannelLayerNorm(channels, eps=eps),
            )
            for layers, in_channels in zip(rescaled, (width // 4, width // 2, width, width))
        )

    def forward(self, cell_maps: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """`cell_maps` are the maps after the cells, of which the last is used."""
        return tuple(level(cell_maps[-1]) for level in self.levels)


class ViTAERescaledMaps(nn.Module):
    """Four maps as wide as the tokens, after `rescaled_cells`: (B, C, H, W) -> 4H×4W, 2H×2W, H×W and H/2×W/2.

    Source: Wang et al. 2022, "Advancing Plain Vision Transformer Towards Remote Sensing Foundation Model", arXiv
    2208.03987, section IV.
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.cells = config.rescaled_cells
        self.layernorm = ViTAEChannelLayerNorm(width, eps=eps) if self.cells == (-1,) else None
        self.levels = nn.ModuleList(nn.Sequential(*layers) for layers in rescaling_layers((width, width, width), eps))

    def forward(self, cell_maps: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """`cell_maps` are the maps after the cells."""
        if self.layernorm is None:
            chosen = [cell_maps[cell] for cell in self.cells]
        else:
            chosen = [self.layernorm(cell_maps[-1])] * len(self.levels)
        return tuple(level(cell_map) for level, cell_map in zip(self.levels, chosen))


class ViTAEBackbone(ViTAEFamilyBackbone, ViTAEPreTrainedModel):
    """ViTAE as a backbone for detection, segmentation, depth and pose.

    The pyramid variants give maps of strides 4, 8 and 16. The plain variants give one of stride 16, or with
    `cell_stages` one after each cell, and, if the configuration has `feature_pyramid_channels` or `rescaled_cells`,
    four more (`"p2"` to `"p5"`, strides 4 to 32). With `reshape_hidden_states=False` they give tokens, and images are
    cut to whole patches, as in the backbones of DINOv2 and BEiT.
    """

    config: ViTAEConfig

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.vitae: ViTAEModel = ViTAEModel(config, add_pooling_layer=False)
        self.size_divisor: int = config.total_stride
        self.layernorm: nn.LayerNorm | None = None
        if config.apply_layernorm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_pyramid: ViTAEFeaturePyramid | ViTAERescaledMaps | None = None
        self.num_features: list[int] = [config.num_channels, *config.hidden_sizes]
        if config.is_plain:
            self.num_features = [config.hidden_size] * (1 + config.num_backbone_stages)
        if config.rescaled_cells:
            self.feature_pyramid = ViTAERescaledMaps(config)
        elif config.feature_pyramid_channels is not None:
            self.feature_pyramid = ViTAEFeaturePyramid(config, config.feature_pyramid_channels)
        if self.feature_pyramid is not None:
            channels = config.feature_pyramid_channels or config.hidden_size
            self.num_features += [channels] * len(self.feature_pyramid.levels)
            self.size_divisor = 2 * config.total_stride
        self.post_init()
        self.train(self.training)  # freezes the first `frozen_stages` stages

    def frozen_modules(self) -> list[nn.Module]:
        if not (self.config.cell_stages and self.config.frozen_stages):
            return super().frozen_modules()
        network = self.base_model
        return [network.embeddings, *network.stages[0].normal_cells[: self.config.frozen_stages]]

    def encode(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, list[torch.Tensor]]:
        if not self.config.is_plain:
            return super().encode(pixel_values, **kwargs)
        cell_outputs: list[torch.Tensor] = []
        outputs = self.vitae(pixel_values, cell_outputs=cell_outputs, **kwargs)
        if self.config.cell_stages:
            outputs.hidden_states = (outputs.hidden_states[0], *cell_outputs)
        height, width = (side // self.config.total_stride for side in pixel_values.shape[-2:])
        states = dict(zip(self.stage_names, outputs.hidden_states))
        maps = {name: self.stage_output(states[name], height, width) for name in self.out_features if name in states}
        if self.feature_pyramid is not None:
            pyramid = self.feature_pyramid([self.as_map(tokens, height, width) for tokens in cell_outputs])
            maps |= dict(zip(self.config.feature_pyramid_names, pyramid))
        return outputs, [maps[name] for name in self.out_features]

    def as_map(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The tokens of the grid as a map: (B, T, C) -> (B, C, H, W)."""
        return tokens_to_map(grid_tokens(tokens, self.config.has_class_token), height, width)

    def stage_output(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What is returned of a stage: its tokens (B, T, C), normalised if asked for, or a map (B, C, H, W)."""
        if self.layernorm is not None:
            tokens = self.layernorm(tokens)
        if self.config.reshape_hidden_states:
            return self.as_map(tokens, height, width)
        return grid_tokens(tokens, self.config.has_class_token and not self.config.return_class_token)

    def forward(  # type: ignore[override]  # the library passes all but the images by keyword
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        if not self.config.reshape_hidden_states:  # heads that take tokens count whole patches
            height, width = (side - side % self.config.patch_size for side in pixel_values.shape[-2:])
            pixel_values = pixel_values[..., :height, :width]
        return super().forward(pixel_values, **{"interpolate_pos_encoding": True, **kwargs})


ViTAEModel.register_for_auto_class("AutoModel")
ViTAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTAEForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ViTAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
ViTAEBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "ViTAEBackbone",
    "ViTAEForImageClassification",
    "ViTAEForMaskedImageModeling",
    "ViTAEForPreTraining",
    "ViTAEModel",
    "ViTAEPreTrainedModel",
]
