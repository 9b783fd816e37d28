# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE: a vision transformer whose cells run attention and convolution in parallel.

Shape key: B batch, C channels (of tokens too), H×W grid, N = H·W tokens, T = N tokens and the class token where there
is one, D head width, M random features, R dilations of a pyramid, E channels of each of its convolutions, s stride.

Between stages flow maps (B, C, H, W); inside a stage, tokens (B, T, C) with `height, width` beside them. The file reads
from leaf to head: helpers, attention, convolution branches, cells, stage, models.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vitae import ViTAEConfig


def map_to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))  # (B, N, C) -> (B, C, H, W), channels last in memory


def stage_input_channels(config: ViTAEConfig, stage_idx: int) -> int:
    return config.hidden_sizes[stage_idx - 1] if stage_idx > 0 else config.num_channels


def nearest_multiples(side: int, stride: int) -> list[int]:
    """The multiples of `stride` next to `side`: one if it is itself valid, else the one below (if any) and above."""
    below = side // stride * stride
    return [multiple for multiple in sorted({below, -(-side // stride) * stride}) if multiple > 0] or [stride]


@contextmanager
def frozen_statistics(module: nn.Module):
    """BatchNorms normalise with their batch's statistics as in training, but do not record them."""
    batch_norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    recorded = [(norm, norm.momentum, norm.num_batches_tracked) for norm in batch_norms]
    for norm, _, num_batches_tracked in recorded:
        # Counts into a copy, since SyncBatchNorm must count.
        norm.momentum, norm.num_batches_tracked = 0.0, num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, num_batches_tracked in recorded:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def checkpoint_cell(checkpoint_function: Callable, cell: nn.Module, function: Callable, *args):
    """Checkpoint a cell so that its BatchNorms count the batch once.

    Gradient checkpointing runs `function`, the cell's forward, again in the backward pass; that second pass must give
    the same values and leave the running statistics alone.
    """
    if torch.compiler.is_compiling():  # the compiler recomputes values and does not replay the updates
        return checkpoint_function(function, *args)
    is_reentrant = getattr(checkpoint_function, "keywords", {}).get("use_reentrant")
    if is_reentrant and torch.is_grad_enabled() and not args[0].requires_grad:
        # Reentrant checkpointing gives the weights no gradient unless an input asks for one, and images do not.
        args = (args[0].detach().requires_grad_(), *args[1:])
    is_recomputation = False

    def run(*args):
        nonlocal is_recomputation
        context, is_recomputation = frozen_statistics(cell) if is_recomputation else nullcontext(), True
        with context:
            return function(*args)

    return checkpoint_function(run, *args)


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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: from `(B, heads, T, D)` to `(B, T, heads, D)` and weights `(B, heads, T, T)`."""
    weights = query @ key.transpose(2, 3) * scaling  # (B, heads, T, T)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class ViTAEAttention(nn.Module):
    """Multi-head softmax self-attention of a normal cell, by whichever backend the config names."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        self.config = config
        self.head_dim = hidden_size // config.num_attention_heads[stage_idx]
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class ViTAERandomFeatureAttention(nn.Module):
    """Single-head attention with random features and a value residual; the widths of input and output differ.

    The value is the residual because the input is wider than the output. `random_projection` (M, C), M = C/2, is drawn
    once and never trained, but saved, since the weights around it were trained for it.
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        in_size = config.reduction_channels[stage_idx] * len(config.reduction_dilations[stage_idx])
        hidden_size = config.hidden_sizes[stage_idx]
        self.q_proj = nn.Linear(in_size, hidden_size)
        self.k_proj = nn.Linear(in_size, hidden_size)
        self.v_proj = nn.Linear(in_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.reduction_dropout_prob)
        self.register_buffer("random_projection", torch.empty(hidden_size // 2, hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attention = random_feature_attention(query, key, value, self.random_projection)
        return value + self.dropout(self.o_proj(attention))


class ViTAEMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class ViTAEDropPath(nn.Module):
    """Drops a residual branch for whole samples, and scales what it keeps.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_full((hidden_states.shape[0], 1, 1), 1 - self.rate).bernoulli()
        return hidden_states * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ViTAEConvLayer(nn.Module):
    """A 3×3 convolution, then BatchNorm and SiLU where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        norm: bool = False,
        act: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation_fn = nn.SiLU() if act else nn.Identity()

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.activation_fn(self.norm(self.conv(feature_map)))


class ViTAEReductionConvBranch(nn.Sequential):
    """Three convolutions beside a reduction cell's attention: (B, Cin, H·s, W·s) -> (B, C, H, W)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        channels = config.reduction_channels[stage_idx]
        layer = partial(ViTAEConvLayer, groups=config.reduction_conv_groups[stage_idx])
        super().__init__(
            layer(stage_input_channels(config, stage_idx), channels, stride=2),
            layer(channels, channels, stride=config.strides[stage_idx] // 2, norm=True),
            layer(channels, config.hidden_sizes[stage_idx]),
        )


class ViTAENormalConvBranch(nn.Sequential):
    """Two or three convolutions beside a normal cell's attention: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        channels = config.hidden_sizes[stage_idx]
        intermediate_channels = int(config.mlp_ratio * channels)
        layer = partial(ViTAEConvLayer, groups=config.conv_groups[stage_idx])
        if config.conv_branch_depth == 2:
            layers = [
                layer(channels, intermediate_channels, norm=True),
                layer(intermediate_channels, channels, act=False),
            ]
        else:
            layers = [
                layer(channels, intermediate_channels, norm=True),
                layer(intermediate_channels, channels, norm=True),
                layer(channels, channels),
            ]
        super().__init__(*layers)


class ViTAEPyramidReduction(nn.Module):
    """Dilated convolutions side by side, which see the image at several scales: (B, Cin, H·s, W·s) -> (B, N, R·E)."""

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        kernel_size, stride = config.reduction_kernel_sizes[stage_idx], config.strides[stage_idx]
        self.convs = nn.ModuleList(
            nn.Conv2d(
                stage_input_channels(config, stage_idx),
                config.reduction_channels[stage_idx],
                kernel_size,
                stride=stride,
                padding=math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2),
                dilation=dilation,
            )
            for dilation in config.reduction_dilations[stage_idx]
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.convs[0].weight.dtype

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        pyramid = torch.cat([conv(feature_map) for conv in self.convs], dim=1)
        return map_to_tokens(nn.functional.gelu(pyramid))


class ViTAECell(GradientCheckpointingLayer):
    """A layer that gradient checkpointing recomputes without counting its batch twice, see [`checkpoint_cell`]."""

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        return partial(checkpoint_cell, self._checkpoint_function, self)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint_function: Callable):
        self._checkpoint_function = checkpoint_function


class ViTAEReductionCell(ViTAECell):
    """Embeds a map at a lower resolution: (B, Cin, H·s, W·s) -> (B, N, C).

    A pyramid of dilated convolutions feeds attention (scale invariance), a convolution branch sees the same input
    (locality), and an MLP follows their sum. There is no drop path.

    Source: Xu et al. 2021, figure 2 (left).
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        in_size = config.reduction_channels[stage_idx] * len(config.reduction_dilations[stage_idx])
        hidden_size = config.hidden_sizes[stage_idx]
        self.pyramid_reduction = ViTAEPyramidReduction(config, stage_idx)
        self.layernorm_before = nn.LayerNorm(in_size, eps=config.reduction_layer_norm_eps)
        self.attention = ViTAERandomFeatureAttention(config, stage_idx)
        self.conv_branch = ViTAEReductionConvBranch(config, stage_idx)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.reduction_layer_norm_eps)
        self.mlp = ViTAEMLP(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.reduction_dropout_prob)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        pyramid = self.pyramid_reduction(feature_map)  # (B, N, R·E)
        attention = self.attention(self.layernorm_before(pyramid))  # (B, N, C)
        hidden_states = attention + map_to_tokens(self.conv_branch(feature_map))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViTAENormalCell(ViTAECell):
    """Attention and a convolution branch in parallel, summed, then an MLP: (B, T, C) -> (B, T, C).

    Attention sees the normalised tokens, the convolution branch the cell's input as it is; a class token takes part in
    attention and MLP only.

    Source: Xu et al. 2021, figure 2 (right).
    """

    def __init__(self, config: ViTAEConfig, stage_idx: int, cell_idx: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        depth_below = sum(config.depths[:stage_idx]) + cell_idx
        self.num_class_tokens = int(config.has_class_token)
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAEAttention(config, stage_idx)
        self.conv_branch = ViTAENormalConvBranch(config, stage_idx)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTAEMLP(hidden_size, int(config.mlp_ratio * hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViTAEDropPath(config.drop_path_rate * depth_below / max(sum(config.depths) - 1, 1))

    def convolve(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        feature_map = tokens_to_map(hidden_states[:, self.num_class_tokens :], height, width)
        tokens = map_to_tokens(self.conv_branch(feature_map))
        if self.num_class_tokens:
            tokens = nn.functional.pad(tokens, (0, 0, 1, 0))  # nothing for the class token
        return tokens

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> torch.Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        convolution = self.convolve(hidden_states, height, width)
        hidden_states = hidden_states + self.drop_path(self.dropout(attention)) + self.drop_path(convolution)
        return hidden_states + self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states))))


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
            hidden_states = self.reduction_cell(hidden_states)  # (B, N, C)
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


class ViTAEPreTrainedModel(PreTrainedModel):
    """Base class: how ViTAE's weights are initialised, loaded, split over devices and checkpointed."""

    config: ViTAEConfig
    base_model_prefix = "vitae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTAEEmbeddings", "ViTAEReductionCell", "ViTAEPyramidReduction", "ViTAENormalCell"]
    _keep_in_fp32_modules_strict = ["random_projection"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTAEStage, "attentions": ViTAEAttention}

    def __init__(self, config: ViTAEConfig, *args, **kwargs):
        config.validate()  # again, since fields can be set after the configuration was made
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        super().post_init()
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = classes.intersection(self._no_split_modules)  # FSDP wants no others

    def save_pretrained(self, *args, **kwargs):
        """The library's. A model that FSDP2 has sharded is saved as what it was, not with a copy of torch's code."""
        current_class = type(self)
        if current_class.__name__.startswith("FSDP"):  # torch's subclass: (FSDPModule, the model's own class)
            self.__class__ = current_class.__bases__[-1]
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current_class

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors' initialisation: truncated normal linears, PyTorch's default for convolutions, zero positions."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, ViTAERandomFeatureAttention):
            init.orthogonal_(module.random_projection, gain=math.sqrt(module.random_projection.shape[0]))
        elif isinstance(module, ViTAEEmbeddings):
            init.zeros_(module.cls_token)
            init.zeros_(module.position_embeddings)
        else:
            super()._init_weights(module)

    def resize_position_embeddings(self, new_image_size: int | tuple[int, int]) -> None:
        """Make another image size the model's own, to fine-tune at it, say: same output as with interpolation.

        Args:
            new_image_size: side, or height and width, in pixels. Learned positions are resampled for it; variants
                without any take every size, and only the configuration changes.

        Raises:
            StrictDataclassError: the size is not a multiple of the stride; the model stays as it was.
        """
        old_image_size, self.config.image_size = self.config.image_size, new_image_size
        try:
            self.config.validate()
        except Exception:
            self.config.image_size = old_image_size
            raise
        for module in self.modules():
            if isinstance(module, ViTAEEmbeddings):
                module.resize(self.config.image_height_width)


class ViTAEModel(ViTAEPreTrainedModel):
    """ViTAE without a head: tokens of the last stage and their mean."""

    def __init__(self, config: ViTAEConfig):
        super().__init__(config)
        self.embeddings = ViTAEEmbeddings(config) if config.has_class_token else None
        self.stages = nn.ModuleList(ViTAEStage(config, stage_idx) for stage_idx in range(config.num_stages))
        self.pooler = ViTAEPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into the first tokens."""
        if self.embeddings is not None:
            return self.embeddings
        reduction_cell = self.stages[0].reduction_cell
        return getattr(reduction_cell, "pyramid_reduction", reduction_cell)

    def validate_pixel_values(self, pixel_values: torch.Tensor | None):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {self.config.num_channels}, height, width), the channel count being"
                f" `config.num_channels`; got {tuple(pixel_values.shape)}."
            )
        stride = self.config.total_stride
        height, width = pixel_values.shape[-2:]
        if height % stride or width % stride or not height or not width:
            nearest = [" or ".join(str(side) for side in nearest_multiples(side, stride)) for side in (height, width)]
            raise ValueError(
                f"Both sides of the input must be multiples of {stride}, the total stride of this model; got height"
                f" {height} and width {width}. The nearest valid sizes are height {nearest[0]} and width {nearest[1]}."
            )

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
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.pooler(hidden_states))


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


ViTAEModel.register_for_auto_class("AutoModel")
ViTAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["ViTAEForImageClassification", "ViTAEModel", "ViTAEPreTrainedModel"]
