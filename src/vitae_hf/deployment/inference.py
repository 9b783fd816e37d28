# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model made ready to be used as fast as it can be."""

import ctypes
import math
import platform

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers_vitae import (
    ViTAEBatchNorm2d,
    ViTAEConvLayer,
    ViTAEFamilyCell,
    ViTAEMLP,
    ViTAEPyramidReduction,
    is_untouched,
)


class FoldedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that the convolution before it has taken over: passes on what it gets, but for training.

    Its weights and statistics are those of the identity, so that whoever saves the model and loads the ordinary network
    from the folder has the same function.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device=norm.running_var.device)
        self.running_var.fill_(1 - norm.eps)
        self.num_batches_tracked.copy_(norm.num_batches_tracked)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map) if self.training else feature_map


class InplaceGELU(nn.Module):
    """GELU in place, which torch has no module for."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(hidden_states)


class PackedLayer(nn.Module):
    """What oneDNN computes from weights in an order of its own, with bias and activation while it multiplies.

    The ordinary weights stay, to be saved, and for whenever a gradient is wanted. They are packed when first used, and
    anew after they were moved, loaded or trained.
    """

    packed: torch.Tensor | None = None

    def is_packable(self, inputs: torch.Tensor) -> bool:
        if type(self.weight) is not nn.Parameter:  # quantised since, or for this call another one
            return False
        if self.training or inputs.dtype != self.weight.dtype or torch.is_autocast_enabled(inputs.device.type):
            return False
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.packed = None  # what comes next may change the weight
            return False
        if torch.is_grad_enabled() and inputs.requires_grad:
            return False
        return not torch.compiler.is_compiling() and (self.packed is not None or can_pack(self.weight))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": None}  # copies and pickles pack for themselves

    def train(self, mode: bool = True):
        self.packed = None
        return super().train(mode)

    def _apply(self, function, recurse=True):
        self.packed = None
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args):
        self.packed = None
        super()._load_from_state_dict(*args)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is torch's own, with a dense floating weight: not quantised, adapted or parametrized."""
    if type(layer) not in (nn.Linear, nn.Conv2d) or type(layer.weight) is not nn.Parameter:
        return False
    return layer.weight.is_floating_point() and layer.weight.layout == torch.strided and is_untouched(layer)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has fast products for this kind of weight, on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and (weight.dtype == torch.float32 or bfloat16)


ACTIVATIONS = {"none": nn.Identity(), "gelu": nn.GELU(), "swish": nn.SiLU(inplace=True)}  # oneDNN's names


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer, and the activation after it; torch's own writes the bias to memory before it multiplies."""

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


AMX_TILE = 16


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A convolution, and the activation after it, together where that is faster.

    Where processors multiply tiles of bfloat16, narrow groups are merged to wide ones: more products, most with zero,
    but whole tiles of them.
    """

    def __init__(self, conv: nn.Conv2d, activation: str):
        sizes = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        super().__init__(conv.in_channels, conv.out_channels, **sizes, bias=False, device="meta")
        self.weight, self.bias, self.activation = conv.weight, conv.bias, activation
        self.eval()

    @torch.no_grad()
    def pack(self, size: torch.Size) -> None:
        """For maps of this size: an order that is bad for it can take four times as long."""
        has_tiles = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        narrowest = min(self.in_channels, self.out_channels) // self.groups
        fitting = AMX_TILE // narrowest if has_tiles and self.weight.dtype == torch.bfloat16 else 1
        merged = math.gcd(self.groups, max(1, fitting))
        blocks = self.weight.unflatten(0, (-1, merged, self.out_channels // self.groups)).movedim(1, -1)
        weight = torch.diag_embed(blocks, dim1=1, dim2=3).flatten(0, 2).flatten(1, 2)  # zero between merged groups
        self.geometry = self.padding, self.stride, self.dilation, self.groups // merged
        fuses = self.groups == 1 or merged > 1  # in narrow groups an activation by itself is faster
        self.fused = self.activation if fuses else "none"
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, size)
        self.packed_for = size[2:]

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if not self.is_packable(feature_map):
            return ACTIVATIONS[self.activation](super().forward(feature_map))
        if self.packed is None or self.packed_for != feature_map.shape[2:]:
            self.pack(feature_map.shape)
        output = torch.ops.mkldnn._convolution_pointwise.default(
            feature_map, self.packed, self.bias, *self.geometry, self.fused, [], "none"
        )
        return output if self.fused == self.activation else ACTIVATIONS[self.activation](output)


def pack(module: nn.Module, name: str, activation: str = "none") -> None:
    """Pack a layer of a module, unless it is something else by now, LoRA's for one."""
    layer = module.get_submodule(name)
    if is_plain(layer):
        packed_class = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}[type(layer)]
        module.set_submodule(name, packed_class(layer, activation))


ACTIVATED = (ViTAEConvLayer, ViTAEPyramidReduction, ViTAEMLP)


def layers_before_activation(module: nn.Module) -> list[str]:
    if isinstance(module, ViTAEPyramidReduction):
        return [f"convs.{index}" for index in range(len(module.convs))]
    return ["fc1"] if isinstance(module, ViTAEMLP) else ["conv"]


def owns_activation(module: nn.Module) -> bool:
    """Whether all before the activation is plain, so that it can work in place, or with them."""
    norm = getattr(module, "norm", nn.Identity())
    if type(norm) not in (nn.Identity, FoldedBatchNorm) or not is_untouched(norm):
        return False
    layers = [module.get_submodule(name) for name in layers_before_activation(module)]
    return all(map(is_plain, layers)) and is_untouched(module.activation_fn)


def pack_layers(model: nn.Module) -> None:
    """Pack every convolution and linear layer of the cells, each with the activation after it."""
    names = {type(activation): name for name, activation in ACTIVATIONS.items()}
    for module in list(model.modules()):
        if isinstance(module, ViTAEFamilyCell):
            for name, _ in module.attention.named_children():
                pack(module.attention, name)
        if not isinstance(module, ACTIVATED):
            continue
        activation = names.get(type(module.activation_fn), "none") if owns_activation(module) else "none"
        for name in layers_before_activation(module):
            pack(module, name, activation)
        if activation != "none":
            module.activation_fn = nn.Identity()
        if isinstance(module, ViTAEMLP):
            pack(module, "fc2")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the whole process, so that a forward pass finds the last one's.

    glibc gives large blocks back at once, and the system maps them anew page by page, which can take as long as all
    the rest. Other C libraries, and allocators loaded in the place of glibc's, stay as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def can_fold(layer: ViTAEConvLayer) -> bool:
    """Whether a layer has a BatchNorm with weights and statistics, after a convolution that is plain."""
    norm = layer.norm
    if type(norm) not in (ViTAEBatchNorm2d, nn.SyncBatchNorm) or norm.weight is None or norm.running_var is None:
        return False
    return is_plain(layer.conv) and is_untouched(norm)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().double()  # there, since not every device has float64


@torch.no_grad()
def fold_batch_norm(layer: ViTAEConvLayer) -> None:
    """Put a layer's BatchNorm, as it is in evaluation, into the weights of its convolution, in float64."""
    conv, norm = layer.conv, layer.norm
    scale = exact(norm.weight) / (exact(norm.running_var) + norm.eps).sqrt()
    weight = exact(conv.weight) * scale[:, None, None, None]
    bias = (exact(conv.bias) - exact(norm.running_mean)) * scale + exact(norm.bias)
    conv.weight.copy_(weight.to(conv.weight.dtype))
    conv.bias.copy_(bias.to(conv.bias.dtype))
    layer.norm = FoldedBatchNorm(norm).eval()


def fold_batch_norms(model: PreTrainedModel) -> None:
    """Put a model in evaluation mode, and its BatchNorms into the convolutions before them.

    Raises:
        ValueError: the model has none of this family's networks.
    """
    layers = [module for module in model.modules() if isinstance(module, ViTAEConvLayer)]
    if not layers:
        raise ValueError(f"expected a ViTAE or ViTAEv2, or a model with such a backbone; got {type(model).__name__}")
    model.eval()
    for layer in filter(can_fold, layers):
        fold_batch_norm(layer)


def prepare_for_inference(
    model: PreTrainedModel, dtype: torch.dtype | None = None, compile: bool = False
) -> PreTrainedModel:
    """Make a model as fast as it can be on its device. What it computes stays the same within rounding.

    The model itself is changed: evaluation mode, no gradients, BatchNorms folded into the convolutions before them,
    activations in place, 4-D weights in channels-last order. Layers that are quantised, adapted (LoRA's), parametrized
    or have hooks stay as they are. On CPUs, convolutions and linear layers keep a second copy
    of their weights, in the order that oneDNN wants, and the C library keeps memory that is freed, for the whole
    process ([`keep_freed_memory`]). The model can be saved: the folder holds an ordinary one with these weights.
    `from_pretrained` brings back what it was.

    Args:
        model: any of this family, or one that has such a backbone, on its device.
        dtype: of the weights, `torch.bfloat16` say; default: as they are. Random features stay float32.
        compile: by `torch.compile`, when first called; each new size of images then compiles again.

    Returns:
        The same model.

    Raises:
        ValueError: the model has none of this family's networks, or weights that are offloaded.

    Example:

        >>> model = AutoModelForImageClassification.from_pretrained("org/vitae-s")
        >>> model = prepare_for_inference(model, dtype=torch.bfloat16)
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights that are offloaded cannot be prepared: load the model without `device_map`")
    fold_batch_norms(model)
    model.requires_grad_(False)
    if dtype is not None:
        model.to(dtype)
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    is_cpu = model.device.type == "cpu"
    if is_cpu:
        keep_freed_memory()
    if is_cpu and not compile:  # a compiler packs by itself
        pack_layers(model)
    for module in model.modules():
        if isinstance(module, ACTIVATED) and owns_activation(module):
            if type(module.activation_fn) is nn.SiLU:
                module.activation_fn.inplace = True
            elif type(module.activation_fn) is nn.GELU:
                module.activation_fn = InplaceGELU()
    if compile:
        model.compile(dynamic=False, options={"freezing": True} if is_cpu else None)
    return model
