# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The layers and cells that ViTAE and ViTAEv2 are made of, from leaf to cell.

A `ViTAEFamily…` class, here and in the files beside, is a base class: ViTAE and ViTAEv2 have subclasses of it. Every
other class in this file is used by both networks as it is.

Shape key: B batch, C channels (of tokens too), H×W grid, N = H·W tokens, T = N tokens and the class token where there
is one, D head width, M random features, R dilations of a pyramid, E channels of each of its convolutions, s stride.

Between stages flow maps (B, C, H, W); inside a stage, tokens (B, T, C) with `height, width` beside them.

Source: Xu et al. 2021, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", arXiv 2106.03348;
Zhang et al. 2022, "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond",
arXiv 2202.10108.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vitae import ViTAEFamilyConfig


def is_program_for_all_sizes() -> bool:
    """Whether this forward pass is recorded as a program, which will get images of other sizes.

    Such a program must contain the steps that only other sizes need, such as padding.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def unflatten(states: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """`Tensor.unflatten`. The older exporter of torch.onnx would record its sizes as constants, so it gets a `view`."""
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


def grid_tokens(tokens: torch.Tensor, has_class_token: bool) -> torch.Tensor:
    """The tokens without the class token: (B, T, C) -> (B, N, C)."""
    # Without a class token there is no slice either, since Core ML cannot convert a slice of everything.
    return tokens[:, 1:] if has_class_token else tokens


def stage_input_channels(config: ViTAEFamilyConfig, stage_idx: int) -> int:
    return config.hidden_sizes[stage_idx - 1] if stage_idx > 0 else config.num_channels


def pyramid_size(config: ViTAEFamilyConfig, stage_idx: int) -> int:
    """Width of a pyramid reduction's tokens, R·E."""
    return config.reduction_channels[stage_idx] * len(config.reduction_dilations[stage_idx])


class ViTAEDropout(nn.Dropout):
    """Dropout that keeps one byte for each number until the backward pass. On CPUs torch's own keeps four."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return hidden_states
        return torch.native_dropout(hidden_states, self.p, True)[0]


class ViTAEMLP(nn.Module):
    """Two linear layers with a GELU, and dropout, between them: (B, T, C) -> (B, T, C)."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout_prob: float = 0.0):
        super().__init__()
        self.fc1: nn.Linear = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn: nn.Module = nn.GELU()
        self.dropout: ViTAEDropout = ViTAEDropout(dropout_prob)
        self.fc2: nn.Linear = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation_fn(self.fc1(hidden_states))))


class ViTAEDropPath(nn.Module):
    """Drops a residual branch for some images of a batch, and scales it up for the others.

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
    """BatchNorm that works as in evaluation while its weight is frozen, in training mode too.

    It then normalises by the recorded statistics and does not update them.

    Adapters such as LoRA's save neither the weight nor the statistics of a frozen layer. If the statistics moved while
    the adapter is trained, they would be lost with the training run.

    With torch 2.11, freeze a model before it is compiled and called: the compiled code does not notice it later.
    """

    num_batches_tracked: torch.Tensor

    @property
    def is_frozen(self) -> bool:
        # `torch.func` replaces parameters by plain tensors, which never require a gradient but are not frozen. Those of
        # a replica of `nn.DataParallel` require one if the parameters do.
        is_parameter = isinstance(self.weight, nn.Parameter) or getattr(self, "_is_replica", False)
        return is_parameter and not self.weight.requires_grad and self.running_var is not None

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if self.training and self.is_frozen:
            statistics = self.running_mean, self.running_var
            return nn.functional.batch_norm(feature_map, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(feature_map)


def batch_norm_silu(
    feature_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """BatchNorm with the batch's own statistics, then SiLU, by operations that have derivatives of any order."""
    return nn.functional.silu(nn.functional.batch_norm(feature_map, None, None, weight, bias, training=True, eps=eps))


class BatchNormSiLU(torch.autograd.Function):
    """Training-mode BatchNorm, then SiLU, in less memory: (B, C, H, W) -> (B, C, H, W), and the batch's statistics.

    Only the input is kept for the backward pass, which normalises it again with the batch's mean and deviation. This
    saves one of the three maps that a layer of a convolution branch would keep. Second derivatives are those of
    [`batch_norm_silu`].
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        feature_map: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normalised, mean, inverse_std = torch.native_batch_norm(
            feature_map, weight, bias, running_mean, running_var, True, momentum, eps
        )
        return nn.functional.silu(normalised, inplace=True), mean, inverse_std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        feature_map, weight, bias, *_, ctx.eps = inputs
        _, mean, inverse_std = output
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.save_for_backward(feature_map, weight, bias, mean, inverse_std)
        ctx.save_for_forward(feature_map, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        feature_map, weight, bias, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of this derivative
            derive = torch.func.vjp(partial(batch_norm_silu, eps=ctx.eps), feature_map, weight, bias)[1]
            return *derive(grad_output), None, None, None, None
        variance = inverse_std.pow(-2) - ctx.eps
        normalised = nn.functional.batch_norm(feature_map, mean, variance, weight, bias, eps=ctx.eps)
        grad_normalised = torch.ops.aten.silu_backward(grad_output, normalised)
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad_normalised, feature_map, weight, None, None, mean, inverse_std, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        primals = ctx.saved_tensors
        filled = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents))
        tangent = torch.func.jvp(partial(batch_norm_silu, eps=ctx.eps), primals, filled)[1]
        return tangent, None, None


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a replaced `forward`, so that other code may compute what it computes."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


class ViTAEConvLayer(nn.Module):
    """A convolution with "same" padding, then BatchNorm and SiLU, either of which can be left out."""

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
        self.conv: nn.Conv2d = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups
        )
        self.norm: nn.Module = ViTAEBatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation_fn: nn.Module = nn.SiLU() if act else nn.Identity()

    def can_save_memory(self, feature_map: torch.Tensor) -> bool:
        """Whether [`BatchNormSiLU`] can replace BatchNorm and SiLU: both are plain, and this is a step of training.

        Compiled code saves the memory by itself. A single value for each channel is left to torch's BatchNorm, which
        raises an error.
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
        feature_map, norm = self.conv(feature_map), self.norm
        if not (isinstance(norm, ViTAEBatchNorm2d) and self.can_save_memory(feature_map)):
            return self.activation_fn(norm(feature_map))
        norm.num_batches_tracked.add_(1)
        return BatchNormSiLU.apply(
            feature_map, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
        )[0]


class ViTAEReductionConvBranch(nn.Sequential):
    """Three convolutions beside a reduction cell's attention: (B, Cin, H·s, W·s) -> (B, C, H, W).

    ViTAE and ViTAEv2 differ in two places: only ViTAEv2 has a BatchNorm after the first convolution, and only ViTAE has
    an activation after the last.
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

    With three convolutions, ViTAE has an activation after the last and ViTAEv2 has none.
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
    """Convolutions of different dilations side by side: (B, Cin, H·s, W·s) -> (B, N, R·E). Each sees another scale."""

    def __init__(self, config: ViTAEFamilyConfig, stage_idx: int):
        super().__init__()
        kernel_size, stride = config.reduction_kernel_sizes[stage_idx], config.strides[stage_idx]
        self.convs: nn.ModuleList = nn.ModuleList(
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
        self.activation_fn: nn.Module = nn.GELU()

    @property
    def dtype(self) -> torch.dtype:
        return self.convs[0].weight.dtype  # type: ignore[return-value]  # to torch every item is just a module

    def forward(self, feature_map: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        pyramid = torch.cat([conv(feature_map) for conv in self.convs], dim=1)
        return self.activation_fn(map_to_tokens(pyramid))


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """In this block, BatchNorms in training mode use their batch's statistics and do not record them."""
    batch_norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    recorded = [(norm, norm.momentum, norm.num_batches_tracked) for norm in batch_norms]
    for norm, _, num_batches_tracked in recorded:
        # SyncBatchNorm cannot be told not to count batches, so it counts in a copy.
        norm.momentum = 0.0
        if num_batches_tracked is not None:
            norm.num_batches_tracked = num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, num_batches_tracked in recorded:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def checkpoint_cell(
    checkpoint_function: Callable[..., Any], cell: nn.Module, function: Callable[..., Any], *args: Any
) -> Any:
    """Run a cell under gradient checkpointing such that its BatchNorms record each batch once.

    Gradient checkpointing runs `function`, the cell's forward, a second time in the backward pass. That second pass
    must give the same values, but must not update the running statistics again.
    """
    if torch.compiler.is_compiling():  # compiled code computes values again, but does not repeat updates
        return checkpoint_function(function, *args)
    is_reentrant = getattr(checkpoint_function, "keywords", {}).get("use_reentrant")
    if is_reentrant and torch.is_grad_enabled() and not args[0].requires_grad:
        # Reentrant checkpointing gives the weights a gradient only if an input requires one. Images do not.
        args = (args[0].detach().requires_grad_(), *args[1:])
    is_recomputation = False

    def run(*args: Any) -> Any:
        nonlocal is_recomputation
        context, is_recomputation = frozen_statistics(cell) if is_recomputation else nullcontext(), True
        with context:
            return function(*args)

    return checkpoint_function(run, *args)


class ViTAEFamilyCell(GradientCheckpointingLayer):
    """A layer that can be checkpointed without recording its batch twice, see [`checkpoint_cell`]."""

    attention: Any  # softmax or random-feature attention; subclasses set it

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        return partial(checkpoint_cell, self._checkpoint_function, self)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint_function: Callable[..., Any]) -> None:
        self._checkpoint_function = checkpoint_function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self._checkpoint_function


class ViTAEFamilyReductionCell(ViTAEFamilyCell):
    """Embeds a map at a lower resolution: (B, Cin, H·s, W·s) -> (B, N, C).

    One branch is a pyramid of dilated convolutions and attention over its tokens (scale invariance). The other is three
    convolutions of the same map (locality). An MLP follows the sum of both. There is no drop path.

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
        self.pyramid_reduction: ViTAEPyramidReduction = ViTAEPyramidReduction(config, stage_idx)
        self.layernorm_before: nn.LayerNorm = nn.LayerNorm(
            pyramid_size(config, stage_idx), eps=config.reduction_layer_norm_eps
        )
        self.attention = attention
        self.conv_branch = conv_branch
        self.layernorm_after: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.reduction_layer_norm_eps)
        self.mlp: ViTAEMLP = ViTAEMLP(hidden_size, hidden_size)
        self.dropout: ViTAEDropout = ViTAEDropout(dropout_prob)

    def forward(self, feature_map: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        pyramid = self.pyramid_reduction(feature_map)  # (B, N, R·E)
        convolution = self.conv_branch(feature_map)  # (B, C, H, W)
        attention, _ = self.attention(self.layernorm_before(pyramid), *convolution.shape[-2:], **kwargs)  # (B, N, C)
        hidden_states = attention + map_to_tokens(convolution)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViTAEFamilyNormalCell(ViTAEFamilyCell):
    """Attention and a convolution branch in parallel, summed, then an MLP: (B, T, C) -> (B, T, C).

    Attention gets the normalised tokens, the convolution branch the tokens as they are. A class token takes part in
    attention and MLP only, since it has no place in the grid.

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
        self.has_class_token: bool = config.has_class_token
        self.layernorm_before: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.conv_branch = conv_branch
        self.layernorm_after: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp: ViTAEMLP = ViTAEMLP(hidden_size, int(config.mlp_ratio * hidden_size), config.hidden_dropout_prob)
        self.dropout: ViTAEDropout = ViTAEDropout(config.hidden_dropout_prob)
        self.drop_path: ViTAEDropPath = ViTAEDropPath(config.drop_path_rates(stage_idx)[cell_idx])

    def convolve(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        feature_map = tokens_to_map(grid_tokens(hidden_states, self.has_class_token), height, width)
        convolved = map_to_tokens(self.conv_branch(feature_map))
        if self.has_class_token:
            convolved = nn.functional.pad(convolved, (0, 0, 1, 0))  # zeros for the class token
        return convolved

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs: Any) -> torch.Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states), height, width, **kwargs)
        convolution = self.convolve(hidden_states, height, width)
        hidden_states = hidden_states + self.drop_path(attention) + self.drop_path(convolution)
        return hidden_states + self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states))))
