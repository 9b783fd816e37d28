# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Layers for inference on CPUs, whose weights are stored in the order that oneDNN computes with ("packed")."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from ..environment import cpu_capabilities
from ..layers_vitae import ViTAEConvLayer, ViTAEFamilyCell, ViTAEMLP, ViTAEPyramidReduction, is_untouched
from ..training.merging import merged_weight
from .folding import FoldedBatchNorm, is_plain


ACTIVATIONS: dict[str, nn.Module] = {"none": nn.Identity(), "gelu": nn.GELU(), "swish": nn.SiLU(inplace=True)}
"""What oneDNN can compute together with a product, by its own names."""

AMX_TILE = 16
"""Channels in a tile of bfloat16, which some processors (with AMX) multiply as a whole."""


class PackedLayer(nn.Module):
    """Base class of layers that oneDNN computes from packed weights, with bias and activation in the same pass.

    The ordinary weights stay. They are saved, and they are used whenever a gradient is needed. The layer packs them at
    its first call, and again after they were moved, loaded or trained.
    """

    packed: torch.Tensor | None = None
    activation: str

    def is_packable(self, inputs: torch.Tensor) -> bool:
        """Whether oneDNN can compute this call. If the weight may be trained next, the packed copy is dropped."""
        if type(self.weight) is not nn.Parameter:  # quantised later, or replaced for this call alone
            return False
        if self.training or inputs.dtype != self.weight.dtype or torch.is_autocast_enabled(inputs.device.type):
            return False
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.packed = None
            return False
        if torch.is_grad_enabled() and inputs.requires_grad:
            return False
        return not torch.compiler.is_compiling() and (self.packed is not None or can_pack(self.weight))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # copies and pickles pack for themselves

    def train(self, mode: bool = True) -> Self:
        self.packed = None
        return super().train(mode)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.packed = None
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*args)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has fast products for this dtype on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and (weight.dtype == torch.float32 or bfloat16)


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer and the activation after it. torch's own layer writes the bias to memory before it multiplies."""

    def __init__(self, linear: nn.Linear, activation: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.activation = linear.weight, linear.bias, activation
        self.eval()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.is_packable(hidden_states):
            return ACTIVATIONS[self.activation](super().forward(hidden_states))
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data)
        return torch.ops.mkldnn._linear_pointwise.default(
            hidden_states, self.packed, self.bias, self.activation, [], "none"
        )


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A convolution and the activation after it, computed in one pass where that is faster.

    On processors with AMX, several narrow groups are merged into a wide one, with zeros between them. This multiplies
    more numbers, but fills whole tiles. In bfloat16, where stride and dilation have a common factor, the convolution
    runs over every so many rows and columns of the map, with a smaller stride and a smaller dilation.
    """

    def __init__(self, conv: nn.Conv2d, activation: str):
        sizes = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        super().__init__(conv.in_channels, conv.out_channels, **sizes, bias=False, device="meta")
        self.weight, self.bias, self.activation = conv.weight, conv.bias, activation
        self.eval()

    @torch.no_grad()
    def pack(self, size: torch.Size) -> None:
        """Pack the weights for maps of this size. Packed for another size they can take four times as long."""
        has_tiles = self.weight.dtype == torch.bfloat16 and has_amx()
        narrowest = min(self.in_channels, self.out_channels) // self.groups
        merged = math.gcd(self.groups, max(1, AMX_TILE // narrowest if has_tiles else 1))
        weight = merged_weight(self.weight, self.groups, merged)
        step = self.step = math.gcd(*self.stride, *self.dilation) if has_tiles else 1
        pads = [int(pad) for pad in self.padding]
        reaches = [gap * (side - 1) for gap, side in zip(self.dilation, self.kernel_size)]
        sides = [side + 2 * pad - reach - 1 for side, pad, reach in zip(size[2:], pads, reaches)]
        self.read: tuple[Any, ...] = (..., *(slice(-pad % step, None, step) for pad in pads))  # of the map
        # Padded by whole steps, the map may give a row or a column too many.
        self.written: tuple[Any, ...] = (..., *(slice(side // stride + 1) for side, stride in zip(sides, self.stride)))
        self.geometry: tuple[Any, ...] = (
            [-(-pad // step) for pad in pads],
            [stride // step for stride in self.stride],
            [gap // step for gap in self.dilation],
            self.groups // merged,
        )
        is_one_pass_faster = self.groups == 1 or merged > 1
        self.fused: str = self.activation if is_one_pass_faster else "none"
        read = torch.empty(size, device="meta")[self.read].shape
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, read)
        self.packed_for: torch.Size = size[2:]

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if not self.is_packable(feature_map):
            return ACTIVATIONS[self.activation](super().forward(feature_map))
        if self.packed is None or self.packed_for != feature_map.shape[2:]:
            self.pack(feature_map.shape)
        if self.step > 1:
            feature_map = feature_map[self.read]
        output = torch.ops.mkldnn._convolution_pointwise.default(
            feature_map, self.packed, self.bias, *self.geometry, self.fused, [], "none"
        )
        output = output if self.fused == self.activation else ACTIVATIONS[self.activation](output)
        return output if self.step == 1 else output[self.written]


def has_amx() -> bool:
    """Whether the processor multiplies whole tiles of bfloat16."""
    return cpu_capabilities().get("amx_bf16", False)


def pack(module: nn.Module, name: str, activation: str = "none") -> None:
    """Replace a module's layer by a packed one, unless it is no longer plain, for example because LoRA adapts it."""
    layer = module.get_submodule(name)
    if is_plain(layer):
        packed_class = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}[type(layer)]
        module.set_submodule(name, packed_class(layer, activation))


WITH_ACTIVATION = (ViTAEConvLayer, ViTAEPyramidReduction, ViTAEMLP)
"""The modules in which an `activation_fn` follows convolutions or a linear layer."""


def layers_before_activation(module: nn.Module) -> list[str]:
    if isinstance(module, ViTAEPyramidReduction):
        return [f"convs.{index}" for index in range(len(module.convs))]
    return ["fc1"] if isinstance(module, ViTAEMLP) else ["conv"]


def owns_activation(module: ViTAEConvLayer | ViTAEPyramidReduction | ViTAEMLP) -> bool:
    """Whether the layers before the activation are plain, so that nobody else sees what the activation overwrites."""
    norm = getattr(module, "norm", nn.Identity())
    if type(norm) not in (nn.Identity, FoldedBatchNorm) or not is_untouched(norm):
        return False
    layers = [module.get_submodule(name) for name in layers_before_activation(module)]
    return all(map(is_plain, layers)) and is_untouched(module.activation_fn)


def pack_layers(model: nn.Module) -> None:
    """Pack all convolutions and linear layers of the cells, each together with the activation after it."""
    names = {type(activation): name for name, activation in ACTIVATIONS.items()}
    for module in list(model.modules()):
        if isinstance(module, ViTAEFamilyCell):
            for name, _ in module.attention.named_children():
                pack(module.attention, name)
        if not isinstance(module, WITH_ACTIVATION):
            continue
        activation = names.get(type(module.activation_fn), "none") if owns_activation(module) else "none"
        for name in layers_before_activation(module):
            pack(module, name, activation)
        if activation != "none":
            module.activation_fn = nn.Identity()
        if isinstance(module, ViTAEMLP):
            pack(module, "fc2")
