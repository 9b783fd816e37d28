# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Layers for inference on CPUs, whose weights are stored in the order that oneDNN computes with ("packed")."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..attention_vitae import ViTAEAttention
from ..environment import cpu_capabilities
from ..layers_vitae import ViTAEConvLayer, ViTAEFamilyCell, ViTAEMLP, ViTAEPyramidReduction, is_untouched
from ..training.merging import groups_of_width, merged_weight
from .folding import FoldedBatchNorm, is_plain


ACTIVATIONS: dict[str, nn.Module] = {"none": nn.Identity(), "gelu": nn.GELU(), "swish": nn.SiLU(inplace=True)}
"""What oneDNN can compute together with a product, by its own names."""

AMX_TILE = 16
"""Channels in a tile of bfloat16, which some processors (with AMX) multiply as a whole."""


class PackedLayer(nn.Module):
    """Base class of layers that oneDNN computes from packed weights, with bias and activation in the same pass.

    They are no `nn.Linear` and no `nn.Conv2d`, so that adapters refuse them: what LoRA adds to a layer's output belongs
    before its activation.

    The ordinary weights stay. They are saved, and they are used whenever a gradient is needed. The layer packs them at
    its first call, and again after they were moved, loaded, trained, replaced, or edited under `torch.no_grad()`. What
    is edited through `.data` in place, or as an inference tensor, cannot be noticed: `model.eval()` makes it count.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: Any = None
    packed_from: list[tuple[int, int]]
    held: list[torch.Tensor] = []  # the weights that were packed, so that no others get their address

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is packed."""
        return [self.weight]

    @property
    def biases(self) -> list[torch.Tensor]:
        return [] if self.bias is None else [self.bias]

    def is_packable(self, inputs: torch.Tensor) -> bool:
        """Whether oneDNN can compute this call. The packed copy is dropped if it is not of the weights as they are."""
        weights = self.weights
        if any(type(weight) is not nn.Parameter for weight in weights):  # quantised later, or replaced for this call
            return False
        if self.training or any(weight.dtype != inputs.dtype for weight in weights):
            return False
        if torch.is_autocast_enabled(inputs.device.type) or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *self.biases)):
            self.packed = None  # an optimizer may change them next
            return False
        if torch.is_grad_enabled() and inputs.requires_grad:
            return False
        versions = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self.packed is not None and self.packed_from != versions:
            self.packed = None
        if self.packed is None:
            self.packed_from, self.held = versions, [weight.detach() for weight in weights]
        return self.packed is not None or all(map(can_pack, weights))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(weight.shape)}" for name, weight in self.named_parameters(recurse=False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None, "held": []}  # copies and pickles pack for themselves

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


def packed_product(
    hidden_states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(hidden_states, packed, bias, activation, [], "none")


class PackedLinear(PackedLayer):
    """A linear layer and the activation after it. torch's own layer writes the bias to memory before it multiplies."""

    def __init__(self, linear: nn.Linear, activation: str):
        super().__init__()
        self.weight, self.bias, self.activation = linear.weight, linear.bias, activation
        self.eval()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.is_packable(hidden_states):
            return ACTIVATIONS[self.activation](nn.functional.linear(hidden_states, self.weight, self.bias))
        packed = self.packed
        if packed is None:
            packed = self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data)
        return packed_product(hidden_states, packed, self.bias, self.activation)


class PackedAttention(PackedLayer, ViTAEAttention):
    """Attention whose queries, keys and values are one product, as long as their three layers are the packed ones."""

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]

    @property
    def biases(self) -> list[torch.Tensor]:
        biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
        return [bias for bias in biases if bias is not None]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        are_packed = all(type(layer) is PackedLinear and is_untouched(layer) for layer in layers)
        biases = self.biases if are_packed else []
        if not are_packed or len(biases) not in (0, len(layers)) or not self.is_packable(hidden_states):
            return super().project(hidden_states)
        packed = self.packed
        if packed is None:
            packed = self.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(self.weights))
        return packed_product(hidden_states, packed, torch.cat(biases) if biases else None).chunk(3, dim=-1)


class PackedWeight(NamedTuple):
    """The weight of a convolution, packed for maps of one size, and how it is computed with.

    Attributes:
        size: height and width of the maps.
        weight: in the order of oneDNN.
        geometry: padding, stride, dilation and groups.
        step: the convolution runs over every so many rows and columns of the map.
        read, written: what of the map is read, and of the output kept.
        fused: the activation that is computed in the same pass.
    """

    size: torch.Size
    weight: torch.Tensor
    geometry: tuple[list[int], list[int], list[int], int]
    step: int
    read: tuple[Any, ...]
    written: tuple[Any, ...]
    fused: str


class PackedConv2d(PackedLayer):
    """A convolution and the activation after it, computed in one pass where that is faster.

    On processors with AMX, several narrow groups are merged into a wide one, with zeros between them. This multiplies
    more numbers, but fills whole tiles. In bfloat16, where stride and dilation have a common factor, the convolution
    runs over every so many rows and columns of the map, with a smaller stride and a smaller dilation.
    """

    def __init__(self, conv: nn.Conv2d, activation: str):
        super().__init__()
        self.weight, self.bias, self.activation = conv.weight, conv.bias, activation
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.eval()

    @torch.no_grad()
    def pack(self, size: torch.Size) -> PackedWeight:
        """The weights, packed for maps of this size. Packed for another size they can take four times as long."""
        has_tiles = self.weight.dtype == torch.bfloat16 and has_amx()
        merged = groups_of_width(self.weight, self.groups, AMX_TILE) if has_tiles else 1
        weight = merged_weight(self.weight, self.groups, merged)
        step = math.gcd(*self.stride, *self.dilation) if has_tiles else 1
        pads = [int(pad) for pad in self.padding]
        reaches = [gap * (side - 1) for gap, side in zip(self.dilation, self.kernel_size)]
        sides = [side + 2 * pad - reach - 1 for side, pad, reach in zip(size[2:], pads, reaches)]
        read: tuple[Any, ...] = (..., *(slice(-pad % step, None, step) for pad in pads))
        # Padded by whole steps, the map may give a row or a column too many.
        written = (..., *(slice(side // stride + 1) for side, stride in zip(sides, self.stride)))
        geometry = (
            [-(-pad // step) for pad in pads],
            [stride // step for stride in self.stride],
            [gap // step for gap in self.dilation],
            self.groups // merged,
        )
        is_one_pass_faster = self.groups == 1 or merged > 1
        fused = self.activation if is_one_pass_faster else "none"
        shape = torch.empty(size, device="meta")[read].shape
        reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)
        return PackedWeight(size[2:], reordered, geometry, step, read, written, fused)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if not self.is_packable(feature_map):
            geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
            return ACTIVATIONS[self.activation](nn.functional.conv2d(feature_map, self.weight, self.bias, *geometry))
        packed = self.packed  # of which another thread may put one for another size in its place
        if packed is None or packed.size != feature_map.shape[2:]:
            packed = self.packed = self.pack(feature_map.shape)
        if packed.step > 1:
            feature_map = feature_map[packed.read]
        output = torch.ops.mkldnn._convolution_pointwise.default(
            feature_map, packed.weight, self.bias, *packed.geometry, packed.fused, [], "none"
        )
        output = output if packed.fused == self.activation else ACTIVATIONS[self.activation](output)
        return output if packed.step == 1 else output[packed.written]


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


def pack_attention(attention: nn.Module) -> None:
    """Pack the layers of an attention. Random features are no faster when queries, keys and values are one product."""
    for name, _ in attention.named_children():
        pack(attention, name)
    if type(attention) is ViTAEAttention:
        attention.__class__ = PackedAttention


def pack_layers(model: nn.Module) -> None:
    """Pack all convolutions and linear layers of the cells, each together with the activation after it."""
    names = {type(activation): name for name, activation in ACTIVATIONS.items()}
    for module in list(model.modules()):
        if isinstance(module, ViTAEFamilyCell):
            pack_attention(module.attention)
        if not isinstance(module, WITH_ACTIVATION):
            continue
        activation = names.get(type(module.activation_fn), "none") if owns_activation(module) else "none"
        for name in layers_before_activation(module):
            pack(module, name, activation)
        if activation != "none":
            module.activation_fn = nn.Identity()
        if isinstance(module, ViTAEMLP):
            pack(module, "fc2")
