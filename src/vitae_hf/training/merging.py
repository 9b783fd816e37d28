# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Grouped convolutions computed with several groups merged into a wide one, where that is faster.

Branches of ViTAE have groups of 4 to 6 channels, for which convolutions of GPUs are slow. Merged groups have zeros
between them: more is multiplied, and in larger pieces.
"""

import math
import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers_vitae import ViTAEConvLayer, is_untouched


WIDEST = 64
"""Channels of merged groups that are still tried. Wider ones multiply zeros for the most part."""

fastest: dict[tuple[Any, ...], int] = {}
"""How many groups are merged, by device, precision, shapes and geometry: measured once in a process."""


def merged_weight(weight: torch.Tensor, groups: int, merged: int) -> torch.Tensor:
    """The weight of a convolution of `groups / merged` groups that computes the same: zeros where groups meet.

    Args:
        weight: of a convolution of `groups` groups, (C, Cin / groups, k, k).
        merged: how many of them become one; divides `groups`.

    Returns:
        (C, merged · Cin / groups, k, k), made of the same numbers, so that their gradients are its own.
    """
    blocks = weight.unflatten(0, (groups // merged, merged, -1)).movedim(1, -1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).flatten(0, 2).flatten(1, 2)


def groups_of_width(weight: torch.Tensor, groups: int, width: int) -> int:
    """How many groups of a convolution to merge, so that their narrower side has this many channels, or nearly."""
    narrowest = min(weight.shape[0] // groups, weight.shape[1])
    return math.gcd(groups, max(1, width // narrowest))


class MergedConv2d(nn.Conv2d):
    """A grouped convolution that is timed for each shape of maps, and then merges as many groups as is fastest.

    Weight and bias are those of the convolution that it replaces. Compiled code is not timed: it merges as many groups
    as the last call that was not compiled, or none.
    """

    def __init__(self, conv: nn.Conv2d):
        sizes: Any = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        super().__init__(conv.in_channels, conv.out_channels, **sizes, bias=False, device="meta")
        self.weight, self.bias, self.merged = conv.weight, conv.bias, 1
        self.train(conv.training)

    @property
    def choices(self) -> list[int]:
        """How many groups can become one: powers of two that divide them, up to `WIDEST` channels."""
        width = max(self.in_channels, self.out_channels) // self.groups
        counts = [2**power for power in range(int(math.log2(max(WIDEST // width, 1))) + 1)]
        return [count for count in counts if self.groups % count == 0]

    def convolve(self, feature_map: torch.Tensor, merged: int) -> torch.Tensor:
        weight = self.weight if merged == 1 else merged_weight(self.weight, self.groups, merged)
        padding: Any = self.padding  # to torch it may also be a word
        return nn.functional.conv2d(
            feature_map, weight, self.bias, self.stride, padding, self.dilation, self.groups // merged
        )

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.merged = self.fastest_for(feature_map)
        return self.convolve(feature_map, self.merged)

    def fastest_for(self, feature_map: torch.Tensor) -> int:
        device = feature_map.device
        is_autocast = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if is_autocast else feature_map.dtype
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        geometry = (self.weight.shape, self.stride, self.padding, self.dilation, self.groups)
        key = (device, precision, is_trained, feature_map.shape, feature_map.stride(), geometry)
        if key not in fastest:
            seconds = {merged: self.seconds(feature_map, merged) for merged in self.choices}
            fastest[key] = min(seconds, key=lambda merged: seconds[merged])
        return fastest[key]

    def seconds(self, feature_map: torch.Tensor, merged: int, calls: int = 5) -> float:
        """Seconds of a call with so many groups merged, and of its backward pass if the weight is trained."""
        feature_map = feature_map.detach().requires_grad_(feature_map.requires_grad)

        def run() -> None:
            output = self.convolve(feature_map, merged)
            if output.requires_grad:
                wanted = [tensor for tensor in (self.weight, feature_map) if tensor.requires_grad]
                torch.autograd.grad(output, wanted, torch.ones_like(output))

        def clock() -> float:
            if feature_map.device.type != "cpu":
                torch.accelerator.synchronize(feature_map.device)
            return time.perf_counter()

        for _ in range(2):  # the first calls choose kernels and take memory
            run()
        started = clock()
        for _ in range(calls):
            run()
        return (clock() - started) / calls


def merge_groups(model: PreTrainedModel) -> None:
    """Let all grouped convolutions of the branches merge groups where that is faster, in place.

    Names of tensors stay, so that the model saves and loads as before. Convolutions that are quantised, adapted or have
    hooks stay as they are.

    Raises:
        ValueError: the model has no grouped convolution of this family.
    """
    layers = [module for module in model.modules() if isinstance(module, ViTAEConvLayer) and module.conv.groups > 1]
    if not layers:
        raise ValueError(f"expected a ViTAE or ViTAEv2 with grouped convolutions, got {type(model).__name__}")
    for layer in layers:
        if type(layer.conv) is nn.Conv2d and type(layer.conv.weight) is nn.Parameter and is_untouched(layer.conv):
            layer.conv = MergedConv2d(layer.conv)
