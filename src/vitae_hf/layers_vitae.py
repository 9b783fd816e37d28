# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What ViTAE and ViTAEv2 are made of, from leaf to cell, and what their model classes share.

Shape key: B batch, C channels (of tokens too), H×W grid, N = H·W tokens, T = N tokens and the class token where there
is one, D head width, M random features, R dilations of a pyramid, E channels of each of its convolutions, s stride.

Between stages flow maps (B, C, H, W); inside a stage, tokens (B, T, C) with `height, width` beside them.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348;
Zhang et al. 2022, "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond",
arXiv 2202.10108.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, load_state_dict
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_vitae import ViTAEFamilyConfig


def serves_all_sizes() -> bool:
    """Whether what runs becomes a program for other sizes too, so that it may not skip what this size does not need."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def unflatten(states: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """`Tensor.unflatten`, after which the older exporter of torch.onnx would take all sizes for constants."""
    if not torch.jit.is_tracing():
        return states.unflatten(dim, sizes)
    return states.view(*states.shape[:dim], *sizes, *states.shape[dim + 1 :])


def map_to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)


def channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    """The same map with its channels innermost in memory, where the convolutions here are fastest.

    `to(memory_format=torch.channels_last)` does the same, but not under `torch.vmap`.
    """
    return feature_map.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return unflatten(tokens.transpose(1, 2), 2, (height, width))  # (B, N, C) -> (B, C, H, W), channels last in memory


def grid_tokens(tokens: torch.Tensor, num_class_tokens: int) -> torch.Tensor:
    """(B, T, C) -> (B, N, C), by no operation where all are of the grid: Core ML has none for a slice of the whole."""
    return tokens[:, num_class_tokens:] if num_class_tokens else tokens


def stage_input_channels(config: ViTAEFamilyConfig, stage_idx: int) -> int:
    return config.hidden_sizes[stage_idx - 1] if stage_idx > 0 else config.num_channels


def pyramid_size(config: ViTAEFamilyConfig, stage_idx: int) -> int:
    """Width of the tokens that a pyramid reduction gives, R·E."""
    return config.reduction_channels[stage_idx] * len(config.reduction_dilations[stage_idx])


def nearest_multiples(side: int, stride: int) -> list[int]:
    """The multiples of `stride` next to `side`: one if it is itself valid, else the one below (if any) and above."""
    below = side // stride * stride
    return [multiple for multiple in sorted({below, -(-side // stride) * stride}) if multiple > 0] or [stride]


def is_readable(file: str) -> bool:
    """Whether the header of a safetensors file can be read."""
    try:
        load_state_dict(file, map_location="meta")
    except Exception:  # of safetensors, which this file may not import
        return False
    return True


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


def window_grid(height: int, width: int, window_size: int) -> tuple[int, int, tuple[int, ...]]:
    """Rows and columns of windows that cover a grid, and what it lacks on the left, right, top and bottom of them."""
    rows, columns = (height + window_size - 1) // window_size, (width + window_size - 1) // window_size
    pad_height, pad_width = rows * window_size - height, columns * window_size - width
    top, left = pad_height // 2, pad_width // 2
    return rows, columns, (left, pad_width - left, top, pad_height - top)


def split_into_windows(tokens: torch.Tensor, height: int, width: int, window_size: int) -> torch.Tensor:
    """(B, N, C) -> (windows of the batch, window_size², C); what the grid lacks is zero, half of it on either side."""
    batch, _, channels = tokens.shape
    rows, columns, padding = window_grid(height, width, window_size)
    grid = unflatten(tokens, 1, (height, width))
    if serves_all_sizes() or any(padding):
        grid = nn.functional.pad(grid, (0, 0, *padding))
    grid = grid.view(batch, rows, window_size, columns, window_size, channels).transpose(2, 3)
    # Cloned, since `reshape` would look whether it must, which an exported program remembers for all sizes.
    return grid.clone(memory_format=torch.contiguous_format).view(batch * rows * columns, window_size**2, channels)


def join_windows(windows: torch.Tensor, batch: int, height: int, width: int, window_size: int) -> torch.Tensor:
    """Inverse of [`split_into_windows`], zeros cut off: (windows of the batch, window_size², C) -> (B, N, C)."""
    rows, columns, padding = window_grid(height, width, window_size)
    channels = windows.shape[-1]
    grid = windows.view(batch, rows, columns, window_size, window_size, channels).transpose(2, 3)
    grid = grid.clone(memory_format=torch.contiguous_format)
    grid = grid.view(batch, rows * window_size, columns * window_size, channels)
    if torch.compiler.is_exporting() and all(type(side) is int for side in padding):
        # For one size. Core ML's converter takes no negative padding; for open sizes, slices would be of no known size.
        left, _, top, _ = padding
        grid = grid.narrow(1, top, height).narrow(2, left, width).clone(memory_format=torch.contiguous_format)
    elif serves_all_sizes() or any(padding):
        grid = nn.functional.pad(grid, (0, 0, *(-side for side in padding)))
    return grid.view(batch, height * width, channels)


class ViTAEDropout(nn.Dropout):
    """Dropout that keeps a byte for each number, for the backward pass; torch's own keeps four on CPUs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return hidden_states
        return torch.native_dropout(hidden_states, self.p, True)[0]


class ViTAEAttention(nn.Module):
    """Multi-head softmax self-attention, by whichever backend the config names: (B, T, Cin) -> (B, T, C).

    Args:
        window_size: side of the windows that attend by themselves; default: all tokens attend to all. Zeros that fill
            the windows at the border take part, as in the authors' code.
        value_residual: whether the value is added to the output, since input and output have different widths.
        has_dropout: whether the configuration's dropout rates apply.
    """

    def __init__(
        self,
        config: ViTAEFamilyConfig,
        in_size: int,
        hidden_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        window_size: int | None = None,
        value_residual: bool = False,
        has_dropout: bool = True,
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob if has_dropout else 0.0
        self.is_causal = False
        self.window_size = window_size
        self.value_residual = value_residual
        self.q_proj = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = ViTAEDropout(config.hidden_dropout_prob if has_dropout else 0.0)

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch = hidden_states.shape[0]
        if self.window_size is not None:
            hidden_states = split_into_windows(hidden_states, height, width, self.window_size)
        query, key, value = (
            unflatten(projection(hidden_states), 2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
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
        output = self.dropout(self.o_proj(output.flatten(2)))
        if self.value_residual:
            output = output + value.transpose(1, 2).flatten(2)
        if self.window_size is not None:
            output = join_windows(output, batch, height, width, self.window_size)
        return output, weights


class ViTAEMLP(nn.Module):
    """Two linear layers with a GELU, and dropout, between them: (B, T, C) -> (B, T, C)."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout_prob: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = nn.GELU()
        self.dropout = ViTAEDropout(dropout_prob)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation_fn(self.fc1(hidden_states))))


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


class ViTAEBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that keeps its statistics while its weight is frozen, and then normalises by them, as in evaluation.

    Whoever freezes the weights wants this layer to stay what it is: adapters such as LoRA's save neither weight nor
    statistics, so that statistics which moved while the adapter was trained would be lost. With torch 2.11, freeze
    before a compiled model is first called: that compiler does not see what is frozen later.
    """

    @property
    def is_frozen(self) -> bool:
        # Bare tensors, which `torch.func` puts in the place of parameters, ask for no gradient and are not frozen.
        is_parameter = isinstance(self.weight, nn.Parameter)
        return is_parameter and not self.weight.requires_grad and self.running_var is not None

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if self.training and self.is_frozen:
            statistics = self.running_mean, self.running_var
            return nn.functional.batch_norm(feature_map, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(feature_map)


def batch_norm_silu(
    feature_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """SiLU of what the batch's own statistics normalise, by operations that have derivatives of any order."""
    return nn.functional.silu(nn.functional.batch_norm(feature_map, None, None, weight, bias, training=True, eps=eps))


class BatchNormSiLU(torch.autograd.Function):
    """Training-mode BatchNorm and SiLU, which saves what it gets and not what is between: (B, C, H, W) -> the same.

    The backward pass normalises again with the batch's mean and deviation. This saves one of the three maps that a
    layer of the convolution branches keeps. Derivatives of the derivative are those of [`batch_norm_silu`].
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(feature_map, weight, bias, running_mean, running_var, momentum, eps):
        normalised, mean, inverse_std = torch.native_batch_norm(
            feature_map, weight, bias, running_mean, running_var, True, momentum, eps
        )
        return nn.functional.silu(normalised, inplace=True), mean, inverse_std

    @staticmethod
    def setup_context(ctx, inputs, output):
        feature_map, weight, bias, *_, ctx.eps = inputs
        _, mean, inverse_std = output
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.save_for_backward(feature_map, weight, bias, mean, inverse_std)
        ctx.save_for_forward(feature_map, weight, bias)

    @staticmethod
    def backward(ctx, grad_output, *_):
        feature_map, weight, bias, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # this derivative will be derived
            _, derive = torch.func.vjp(partial(batch_norm_silu, eps=ctx.eps), feature_map, weight, bias)
            return *derive(grad_output), None, None, None, None
        variance = inverse_std.pow(-2) - ctx.eps
        normalised = nn.functional.batch_norm(feature_map, mean, variance, weight, bias, eps=ctx.eps)
        grad_normalised = torch.ops.aten.silu_backward(grad_output, normalised)
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad_normalised, feature_map, weight, None, None, mean, inverse_std, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        primals = ctx.saved_tensors
        tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]
        _, tangent = torch.func.jvp(partial(batch_norm_silu, eps=ctx.eps), primals, tuple(tangents))
        return tangent, None, None


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody sees or changes what goes through a module, by hooks or a forward in the place of its own."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


class ViTAEConvLayer(nn.Module):
    """A convolution with "same" padding, then BatchNorm and SiLU where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups)
        self.norm = ViTAEBatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation_fn = nn.SiLU() if act else nn.Identity()

    def saves_memory(self, feature_map: torch.Tensor) -> bool:
        """Whether [`BatchNormSiLU`] does the same for less; a compiler finds that by itself.

        Of one value per channel, torch's own BatchNorm raises its error.
        """
        norm = self.norm
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or nn.modules.module._has_any_global_hook():
            return False
        if type(norm) is not ViTAEBatchNorm2d or type(self.activation_fn) is not nn.SiLU:
            return False
        if not (is_untouched(norm) and is_untouched(self.activation_fn)):
            return False
        uses_batch = norm.training and norm.track_running_stats and not norm.is_frozen and norm.momentum is not None
        return uses_batch and feature_map.numel() > feature_map.shape[1]

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        feature_map = self.conv(feature_map)
        if not self.saves_memory(feature_map):
            return self.activation_fn(self.norm(feature_map))
        norm = self.norm
        norm.num_batches_tracked.add_(1)
        return BatchNormSiLU.apply(
            feature_map, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
        )[0]


class ViTAEReductionConvBranch(nn.Sequential):
    """Three convolutions beside a reduction cell's attention: (B, Cin, H·s, W·s) -> (B, C, H, W).

    In ViTAE the first has no BatchNorm and the last an activation, in ViTAEv2 the first has one and the last none.
    """

    def __init__(self, config: ViTAEFamilyConfig, stage_idx: int, first_norm: bool = False, last_act: bool = True):
        channels = config.reduction_channels[stage_idx]
        layer = partial(ViTAEConvLayer, groups=config.reduction_conv_groups[stage_idx])
        super().__init__(
            layer(stage_input_channels(config, stage_idx), channels, stride=2, norm=first_norm),
            layer(channels, channels, stride=config.strides[stage_idx] // 2),
            layer(channels, config.hidden_sizes[stage_idx], norm=False, act=last_act),
        )


class ViTAENormalConvBranch(nn.Sequential):
    """Two or three convolutions beside a normal cell's attention: (B, C, H, W) -> (B, C, H, W).

    The last of three has an activation in ViTAE and none in ViTAEv2.
    """

    def __init__(
        self, config: ViTAEFamilyConfig, stage_idx: int, depth: int = 3, kernel_size: int = 3, last_act: bool = True
    ):
        channels = config.hidden_sizes[stage_idx]
        intermediate_channels = int(config.mlp_ratio * channels)
        layer = partial(ViTAEConvLayer, kernel_size=kernel_size, groups=config.conv_groups[stage_idx])
        layers = [layer(channels, intermediate_channels)]
        if depth == 2:
            layers += [layer(intermediate_channels, channels, norm=False, act=False)]
        else:
            layers += [layer(intermediate_channels, channels), layer(channels, channels, norm=False, act=last_act)]
        super().__init__(*layers)


class ViTAEPyramidReduction(nn.Module):
    """Dilated convolutions side by side, which see the image at several scales: (B, Cin, H·s, W·s) -> (B, N, R·E)."""

    def __init__(self, config: ViTAEFamilyConfig, stage_idx: int):
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
        self.activation_fn = nn.GELU()

    @property
    def dtype(self) -> torch.dtype:
        return self.convs[0].weight.dtype

    def forward(self, feature_map: torch.Tensor, **kwargs) -> torch.Tensor:
        pyramid = torch.cat([conv(feature_map) for conv in self.convs], dim=1)
        return self.activation_fn(map_to_tokens(pyramid))


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


class ViTAECell(GradientCheckpointingLayer):
    """A layer that gradient checkpointing recomputes without counting its batch twice, see [`checkpoint_cell`]."""

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        return partial(checkpoint_cell, self._checkpoint_function, self)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint_function: Callable):
        self._checkpoint_function = checkpoint_function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self):
        del self._checkpoint_function


class ViTAEFamilyReductionCell(ViTAECell):
    """Embeds a map at a lower resolution: (B, Cin, H·s, W·s) -> (B, N, C).

    A pyramid of dilated convolutions feeds attention (scale invariance), a convolution branch sees the same input
    (locality), and an MLP follows their sum. There is no drop path.

    Source: Xu et al. 2021, figure 2 (left).
    """

    def __init__(
        self,
        config: ViTAEFamilyConfig,
        stage_idx: int,
        attention: nn.Module,
        conv_branch: nn.Module,
        dropout_prob: float,
    ):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        self.pyramid_reduction = ViTAEPyramidReduction(config, stage_idx)
        self.layernorm_before = nn.LayerNorm(pyramid_size(config, stage_idx), eps=config.reduction_layer_norm_eps)
        self.attention = attention
        self.conv_branch = conv_branch
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.reduction_layer_norm_eps)
        self.mlp = ViTAEMLP(hidden_size, hidden_size)
        self.dropout = ViTAEDropout(dropout_prob)

    def forward(self, feature_map: torch.Tensor, **kwargs) -> torch.Tensor:
        pyramid = self.pyramid_reduction(feature_map)  # (B, N, R·E)
        convolution = self.conv_branch(feature_map)  # (B, C, H, W)
        attention, _ = self.attention(self.layernorm_before(pyramid), *convolution.shape[-2:], **kwargs)  # (B, N, C)
        hidden_states = attention + map_to_tokens(convolution)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViTAEFamilyNormalCell(ViTAECell):
    """Attention and a convolution branch in parallel, summed, then an MLP: (B, T, C) -> (B, T, C).

    Attention sees the normalised tokens, the convolution branch the cell's input as it is; a class token takes part in
    attention and MLP only.

    Source: Xu et al. 2021, figure 2 (right).
    """

    def __init__(
        self,
        config: ViTAEFamilyConfig,
        stage_idx: int,
        cell_idx: int,
        attention: nn.Module,
        conv_branch: nn.Module,
    ):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        self.num_class_tokens = int(config.has_class_token)
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.conv_branch = conv_branch
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTAEMLP(hidden_size, int(config.mlp_ratio * hidden_size), config.hidden_dropout_prob)
        self.dropout = ViTAEDropout(config.hidden_dropout_prob)
        self.drop_path = ViTAEDropPath(config.drop_path_rates(stage_idx)[cell_idx])

    def convolve(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        feature_map = tokens_to_map(grid_tokens(hidden_states, self.num_class_tokens), height, width)
        tokens = map_to_tokens(self.conv_branch(feature_map))
        if self.num_class_tokens:
            tokens = nn.functional.pad(tokens, (0, 0, 1, 0))  # nothing for the class token
        return tokens

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> torch.Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states), height, width, **kwargs)
        convolution = self.convolve(hidden_states, height, width)
        hidden_states = hidden_states + self.drop_path(attention) + self.drop_path(convolution)
        return hidden_states + self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states))))


class ViTAEFamilyPreTrainedModel(PreTrainedModel):
    """Base class: how weights are initialised, loaded, saved, split over devices and checkpointed."""

    config: ViTAEFamilyConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # What some classes of a family have and others have not, in themselves or in their base model.
    optional_parts = ("classifier",)

    def __init__(self, config: ViTAEFamilyConfig, *args, **kwargs):
        config.validate()  # again, since fields can be set after the configuration was made
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        super().post_init()  # makes sets of what the class names; these keep what this network has
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules &= classes  # FSDP wants no others
        self._keep_in_fp32_modules_strict &= {name.rpartition(".")[-1] for name, _ in self.named_buffers()}

    def save_pretrained(self, *args, **kwargs):
        """The library's. A model that FSDP2 has sharded is saved as what it was, not with a copy of torch's code."""
        current_class = type(self)
        if current_class.__name__.startswith("FSDP"):  # torch's subclass: (FSDPModule, the model's own class)
            self.__class__ = current_class.__bases__[-1]
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current_class

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the library looks for the attention in the file of the model, and it is in this one

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        # Set on this model alone, since a class passes its list on to every model that it becomes a part of.
        for part in model.optional_parts:
            if getattr(model, part, None) is None and getattr(model.base_model, part, None) is None:
                model._keys_to_ignore_on_load_unexpected.add(rf"^({model.base_model_prefix}\.)?{part}\.")
        try:
            return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # whose message does not say which file it is about
                raise
            damaged = [str(file) for file in checkpoint_files if not is_readable(file)] or map(str, checkpoint_files)
            raise OSError(f"the weights in {', '.join(damaged)} are damaged: {error}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors' initialisation: truncated normal linears and PyTorch's default for convolutions."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into the first tokens."""
        if self.base_model is not self:
            return self.base_model.get_input_embeddings()
        reduction_cell = self.stages[0].reduction_cell
        return getattr(reduction_cell, "pyramid_reduction", reduction_cell)

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
        if self.config.has_class_token:
            self.base_model.embeddings.resize(self.config.image_height_width)

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


class ViTAEFamilyBackbone(BackboneMixin):
    """What the backbones share: feature maps for any image size, and stages that are not trained.

    `out_features` or `out_indices` of the configuration choose the maps, `"stem"` (what the first stage gets) or
    `"stage1"` and so on; `channels` has their widths in the same order. With `frozen_stages`, the first stages keep
    their weights, draw no dropout and do not update their BatchNorm statistics, in training mode too.
    """

    def frozen_modules(self) -> list[nn.Module]:
        embeddings = getattr(self.base_model, "embeddings", None)
        frozen = list(self.base_model.stages[: self.config.frozen_stages])
        return [embeddings, *frozen] if frozen and embeddings is not None else frozen

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen_modules():  # loading makes all weights trainable, and ends with a call of `eval`
            module.eval().requires_grad_(False)
        return self

    def feature_maps_of(self, hidden_states: tuple[torch.Tensor, ...], image_size: torch.Size) -> tuple:
        """A map for each of `stage_names`."""
        return hidden_states

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Normalised images of any size. Sides that are no multiples of `size_divisor` pixels are filled up with
                zeros on the right and at the bottom.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*):
                As in the models.

        Returns:
            `BackboneOutput`: `feature_maps`, a tuple of maps `(B, channels[i], height / stride, width / stride)`, their
            sides rounded up, and `hidden_states` (of filled-up images) and `attentions` when asked for.
        """
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % self.size_divisor, 0, -height % self.size_divisor))
        outputs = self.base_model(padded, **kwargs)
        maps = dict(zip(self.stage_names, self.feature_maps_of(outputs.hidden_states, padded.shape[-2:])))
        feature_maps = []
        for name in self.out_features:  # without what covers zeros alone
            stride = padded.shape[-1] // maps[name].shape[-1]
            feature_maps.append(maps[name][..., : (height + stride - 1) // stride, : (width + stride - 1) // stride])
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
