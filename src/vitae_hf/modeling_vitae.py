# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE: a vision transformer whose cells run attention and convolution in parallel.

The shape key and what it shares with ViTAEv2 are in `layers_vitae.py`; this file has the random-feature attention, the
class token, and the models, from leaf to head.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348.
"""

import copy
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.linalg import vector_norm
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vitae import ViTAEConfig
from .decoder_vitae import (
    ViTAEDecoder,
    interpolate_positions,
    masked_patch_loss,
    random_mask,
    select_tokens,
    sin_cos_positions,
)
from .layers_vitae import (
    ViTAEAttention,
    ViTAEDropout,
    ViTAEFamilyBackbone,
    ViTAEFamilyNormalCell,
    ViTAEFamilyPreTrainedModel,
    ViTAEFamilyReductionCell,
    ViTAENormalConvBranch,
    ViTAEPyramidReduction,
    ViTAEReductionConvBranch,
    channels_last,
    grid_tokens,
    map_to_tokens,
    pyramid_size,
    tokens_to_map,
)


def constant(states: torch.Tensor) -> torch.Tensor:
    """Detached, but in exported programs, where this would be an operation that Core ML does not have."""
    # Under torch 2.11 all that is compiled counts as exported too, and there gradients are wanted.
    is_exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return states if is_exporting else states.detach()


def random_feature_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, random_projection: torch.Tensor, eps: float = 1e-8
) -> torch.Tensor:
    """Attention with the softmax kernel replaced by its random-feature estimate, in time linear in N.

    With w the rows of `random_projection`, exp(q·k) is the mean over w of exp(w·q - |q|²/2) exp(w·k - |k|²/2): the
    product of two positive features φ. Computes φ(q)·(φ(k)ᵀ v) / (φ(q)·Σφ(k) + eps). Each exponential is taken relative
    to its largest value, and these shifts, which cancel in the quotient, are moved into `eps`, as is |q|²/2: the result
    is the same, and neither large nor small activations overflow or divide by zero. All is float32, under autocast too,
    but for the two products with bfloat16 values.

    Args:
        query, key: `(B, N, C)`, not scaled.
        value: `(B, N, C)`.
        random_projection: `(M, C)`.
        eps: what the denominator is increased by.

    Returns:
        `(B, N, C)` in the dtype of `value`.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1 and equation 4.
    """
    with maybe_autocast(device_type=value.device.type, enabled=False):
        query, key, projection = query.float(), key.float(), random_projection.float()
        query_logs, key_logs = query @ projection.T, key @ projection.T  # (B, N, M), w·x
        query_norms, key_norms = (vector_norm(states, dim=-1, keepdim=True).square() / 2 for states in (query, key))
        query_shifts = constant(query_logs).amax(-1, keepdim=True)  # (B, N, 1)
        key_shift = (constant(key_logs).amax(-1, keepdim=True) - constant(key_norms)).amax(1, keepdim=True)  # (B, 1, 1)
        query_features, key_features = query_logs.sub_(query_shifts).exp_(), key_logs.sub_(key_norms + key_shift).exp_()
        # Within these bounds eps stays a normal float32, outside of them it decides nothing.
        shifted_eps = eps * projection.shape[0] * (query_norms - query_shifts - key_shift).clamp(-60, 80).exp()
        denominator = query_features @ key_features.sum(1).unsqueeze(-1) + shifted_eps
        # Divided first, where there are M of them and not C. Exponents need float32; between 0 and 1, bfloat16 will do.
        dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
        query_features, key_features = (query_features / denominator).to(dtype), key_features.to(dtype)
        output = query_features @ (key_features.transpose(1, 2) @ value.to(dtype))
        return output.to(value.dtype)


HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONV_BRANCH_WEIGHT = re.compile(r"normal_cells\.\d+\.conv_branch\.\d+\.conv\.weight$")


class ViTAERandomFeatureAttention(nn.Module):
    """Single-head attention with random features and a value residual; the widths of input and output differ.

    The value is the residual because the input is wider than the output. `random_projection` (M, C), M = C/2, is drawn
    once and never trained, but saved, since the weights around it were trained for it. It is float32, whatever the
    dtype of the model.
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        in_size, hidden_size = pyramid_size(config, stage_idx), config.hidden_sizes[stage_idx]
        self.q_proj = nn.Linear(in_size, hidden_size)
        self.k_proj = nn.Linear(in_size, hidden_size)
        self.v_proj = nn.Linear(in_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = ViTAEDropout(config.reduction_dropout_prob)
        projection = torch.empty(hidden_size // 2, hidden_size, dtype=torch.float32)
        self.register_buffer("random_projection", projection)

    def _apply(self, function, recurse: bool = True):
        """Move the module, or change its dtype, all but that of the random projection."""
        before = self.random_projection
        super()._apply(function, recurse)
        if self.random_projection.dtype != before.dtype:
            self.random_projection = before.to(self.random_projection.device)
        return self

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
    """Patches, class token and positions of the class-token variants: (B, Cin, H·s, W·s) -> (B, 1 + N, C).

    Positions are learned from zero, or fixed sines and cosines (`fixed_positions`), as in masked autoencoders.
    """

    def __init__(self, config: ViTAEConfig, fixed_positions: bool = False):
        super().__init__()
        self.fixed_positions = fixed_positions
        hidden_size, stride = config.hidden_sizes[0], config.strides[0]
        height, width = config.image_height_width
        self.image_size = config.image_height_width
        self.grid_size = (height // stride, width // stride)
        self.projection = nn.Conv2d(config.num_channels, hidden_size, stride, stride=stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], hidden_size)
        self.position_embeddings = nn.Parameter(positions, requires_grad=not fixed_positions)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.fixed_positions:  # loading makes all weights trainable, and ends with a call of `eval`
            self.position_embeddings.requires_grad_(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def interpolate_pos_encoding(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Positions for another grid, as ViT resamples them (bicubic, no antialiasing), the class token's kept."""
        return interpolate_positions(self.position_embeddings, self.grid_size, grid_size)

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Make another image size the one that positions are for."""
        stride = self.projection.stride[0]
        grid_size = (image_size[0] // stride, image_size[1] // stride)
        positions = self.interpolate_pos_encoding(grid_size).clone()
        self.position_embeddings = nn.Parameter(positions, requires_grad=self.position_embeddings.requires_grad)
        self.image_size, self.grid_size = image_size, grid_size

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        ids_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
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
        tokens = torch.cat([class_tokens, map_to_tokens(patches)], dim=1) + positions
        if ids_keep is not None:
            tokens = torch.cat([tokens[:, :1], select_tokens(tokens[:, 1:], ids_keep)], dim=1)  # (B, 1 + K, C)
        return tokens


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
        pooled = grid_tokens(hidden_states, self.num_class_tokens).mean(1)  # (B, C)
        return pooled if self.layernorm is None else self.layernorm(pooled)


class ViTAEPreTrainedModel(ViTAEFamilyPreTrainedModel):
    """Base class: how ViTAE's weights are initialised, loaded, saved and split over devices."""

    config: ViTAEConfig
    base_model_prefix = "vitae"
    _no_split_modules = [
        "ViTAEEmbeddings",
        "ViTAEReductionCell",
        "ViTAEPyramidReduction",
        "ViTAENormalCell",
        "ViTAEDecoderLayer",
    ]
    _keep_in_fp32_modules_strict = ["random_projection"]
    optional_parts = ("classifier", "decoder", "feature_pyramid", "layernorm", "pooler")
    _can_record_outputs = {"hidden_states": ViTAEStage, "attentions": ViTAEAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors': beside the weights of layers, orthogonal random features, and zero or fixed positions."""
        if isinstance(module, ViTAERandomFeatureAttention):
            init.orthogonal_(module.random_projection, gain=math.sqrt(module.random_projection.shape[0]))
        elif isinstance(module, ViTAEEmbeddings) and not module.fixed_positions:
            init.zeros_(module.cls_token)
            init.zeros_(module.position_embeddings)
        elif isinstance(module, (ViTAEEmbeddings, ViTAEDecoder)):  # of a masked autoencoder
            token = module.cls_token if isinstance(module, ViTAEEmbeddings) else module.mask_token
            init.normal_(token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, sin_cos_positions(module.grid_size, token.shape[-1]))
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The library's. Of a masked autoencoder, all other classes get 3×3 kernels ([`expand_conv_kernels`]).

        `conv_kernel_size=1` leaves the 1×1 kernels as they are (not by Auto classes, which do not pass it on).
        """
        if issubclass(cls, ViTAEForPreTraining):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        wanted = kwargs.get("conv_kernel_size")
        if wanted == 3:
            del kwargs["conv_kernel_size"]
        config = kwargs.get("config")
        saved = cls._saved_conv_kernel_size(pretrained_model_name_or_path, **kwargs)
        if saved is not None:  # what is 1×1 must be loaded as such, whatever this configuration says
            if isinstance(config, PreTrainedConfig):
                kwargs["config"] = copy.deepcopy(config)
                kwargs["config"].conv_kernel_size = saved
            else:
                kwargs.setdefault("conv_kernel_size", saved)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info=True`
        if wanted != 1 and model.config.conv_kernel_size == 1:
            model.expand_conv_kernels()
        return loaded

    @staticmethod
    def _saved_conv_kernel_size(source, config=None, state_dict: dict | None = None, **kwargs) -> int | None:
        """The kernels of the weights to load; `None`: unknown, or as the configuration of the same folder says."""
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

    @torch.no_grad()
    def expand_conv_kernels(self) -> None:
        """Make 3×3 kernels of the 1×1 kernels in the normal cells' branches: zeros around, so that nothing changes yet.

        This is how a pretrained masked autoencoder begins to see neighbours; `config.conv_kernel_size` becomes 3.

        Raises:
            ValueError: some of the kernels are offloaded, so that they cannot be changed; the model stays as it was.

        Source: Zhang et al. 2022, ViTAEv2 (arXiv 2202.10108), on scaling ViTAE up.
        """
        cells = [module for module in self.modules() if isinstance(module, ViTAENormalCell)]
        convs = [layer.conv for cell in cells for layer in cell.conv_branch if layer.conv.kernel_size == (1, 1)]
        if any(conv.weight.is_meta for conv in convs):
            raise ValueError(
                "the 1×1 kernels of a masked autoencoder cannot be made 3×3 while they are offloaded: load the model"
                " without `device_map`, save it, and load what was saved"
            )
        for conv in convs:
            weight = nn.functional.pad(conv.weight, (1, 1, 1, 1))
            conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
            conv.kernel_size, conv.padding = (3, 3), (1, 1)
            conv._reversed_padding_repeated_twice = [1, 1, 1, 1]  # torch's copy of `padding`
        self.config.conv_kernel_size = 3


class ViTAEModel(ViTAEPreTrainedModel):
    """ViTAE without a head: tokens of the last stage and, with the pooling layer, their mean."""

    def __init__(self, config: ViTAEConfig, add_pooling_layer: bool = True, fixed_positions: bool = False):
        super().__init__(config)
        self.embeddings = ViTAEEmbeddings(config, fixed_positions) if config.has_class_token else None
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
        ids_keep: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Normalised images; both sides are multiples of `config.total_stride`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Class-token variants: interpolate the position table to another size than `config.image_size`. The
                pyramid variants have no positions and take any valid size as it is.
            ids_keep (`torch.LongTensor` of shape `(B, K)`, *optional*):
                Class-token variants with `conv_kernel_size=1`: encode these patches of each image alone, numbered row
                by row from 0. The tokens are then `(B, 1 + K, C)`, in this order.
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
            ValueError: the shape of `pixel_values` is not as above, or `ids_keep` is given to another network.
        """
        self.validate_pixel_values(pixel_values)
        if ids_keep is not None and not (self.config.has_class_token and self.config.conv_kernel_size == 1):
            raise ValueError("`ids_keep` takes a class token and `conv_kernel_size=1`: chosen patches form no grid.")
        height, width = pixel_values.shape[-2:]
        hidden_states = channels_last(pixel_values.to(self.get_input_embeddings().dtype))
        if self.embeddings is not None:
            hidden_states = self.embeddings(hidden_states, interpolate_pos_encoding, ids_keep)
        for stage, stride in zip(self.stages, self.config.strides):
            height, width = (height // stride, width // stride) if ids_keep is None else (ids_keep.shape[1], 1)
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


@dataclass
class ViTAEForPreTrainingOutput(ModelOutput):
    """What [`ViTAEForPreTraining`] returns; the names are those of transformers' ViTMAE.

    Attributes:
        loss (`torch.Tensor` of shape `()`):
            Mean squared error of the masked patches.
        logits (`torch.Tensor` of shape `(B, N, p² · num_channels)`):
            Predicted pixels of all N patches of side p, row by row, channels innermost; those of visible patches are
            trained for nothing.
        mask (`torch.Tensor` of shape `(B, N)`):
            1 for a masked patch, 0 for a visible one.
        ids_restore (`torch.LongTensor` of shape `(B, N)`):
            Place of each patch in the order of the encoder: visible patches first, then masked ones.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*):
            The encoder's.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None


class ViTAEForPreTraining(ViTAEPreTrainedModel):
    """A class-token variant as a masked autoencoder: sees a quarter of the patches, predicts the pixels of the rest.

    Positions are fixed, kernels 1×1, since what is visible forms no grid. Any other class of this family loads the
    encoder from a saved folder, with learned positions and 3×3 kernels that begin as the same function.

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

    accepts_loss_kwargs = False  # the loss is the mean of a batch, whose parts the Trainer averages

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
        self.vitae = ViTAEModel(config, add_pooling_layer=False, fixed_positions=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = ViTAEDecoder(config)
        self.post_init()

    def resize_position_embeddings(self, new_image_size: int | tuple[int, int]) -> None:
        super().resize_position_embeddings(new_image_size)
        self.decoder.resize(self.config.image_height_width)

    def expand_conv_kernels(self) -> None:
        raise ValueError("a masked autoencoder keeps its 1×1 kernels; load the saved folder as another class instead")

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
                Decides the mask: the patches with the least stay visible. Default: random.

        Returns:
            [`ViTAEForPreTrainingOutput`]; `hidden_states` and `attentions`, when asked for, are those of the visible
            patches.

        Raises:
            ValueError: `noise` has another shape, or `config.mask_ratio` leaves no patch visible, or none masked.
        """
        self.validate_pixel_values(pixel_values)
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


class ViTAEFeaturePyramid(nn.Module):
    """Maps 4, 2, 1 and 1/2 times as large as the one they are each made from: (B, C, H, W) -> four maps (B, E, …).

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", figure 2, simple
    feature pyramid.
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        width, channels = config.hidden_size, config.feature_pyramid_channels
        eps = config.layer_norm_eps
        rescaled = [  # layers and the width after them
            (
                [
                    nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                    ViTAEChannelLayerNorm(width // 2, eps=eps),
                    nn.GELU(),
                    nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
                ],
                width // 4,
            ),
            ([nn.ConvTranspose2d(width, width // 2, 2, stride=2)], width // 2),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(in_channels, channels, 1, bias=False),
                ViTAEChannelLayerNorm(channels, eps=eps),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ViTAEChannelLayerNorm(channels, eps=eps),
            )
            for layers, in_channels in rescaled
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
        self.train(self.training)  # freezes stages

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
ViTAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
ViTAEBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "ViTAEBackbone",
    "ViTAEForImageClassification",
    "ViTAEForPreTraining",
    "ViTAEModel",
    "ViTAEPreTrainedModel",
]
