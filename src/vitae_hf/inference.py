# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model made ready to be used as fast as it can be."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers_vitae import ViTAEConvLayer, ViTAEMLP, ViTAEPyramidReduction


class InplaceGELU(nn.Module):
    """GELU in place, which torch has no module for: what is not allocated need not be mapped page by page."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(hidden_states)


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


AMX_TILE = 16


def has_amx() -> bool:
    """Whether this processor multiplies bfloat16 matrices in tiles."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


class MergedConv2d(nn.Conv2d):
    """A grouped convolution computed with fewer, wider groups: more products, most with zero, but in whole tiles.

    Its state dict is the grouped convolution's, so that a saved model is the ordinary one.
    """

    def __init__(self, conv: nn.Conv2d, merged: int):
        kwargs = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        channels = conv.in_channels, conv.out_channels
        super().__init__(*channels, **kwargs, groups=conv.groups // merged, device="meta", dtype=conv.weight.dtype)
        self.merged = merged
        self.weight, self.bias = nn.Parameter(self.merge(conv.weight), requires_grad=False), conv.bias

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(0, (self.groups, self.merged, -1)).movedim(1, -1)  # (groups, O, I, kH, kW, merged)
        return torch.diag_embed(blocks, dim1=1, dim2=3).flatten(0, 2).flatten(1, 2)

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(1, (self.merged, -1)).unflatten(0, (self.groups, self.merged, -1))
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 2).contiguous()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.split(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}weight"
        super()._load_from_state_dict({**state_dict, name: self.merge(state_dict[name])}, prefix, *args)


def merge_groups(layer: ViTAEConvLayer) -> None:
    """Merge as many groups of a layer's convolution as fill a tile."""
    conv = layer.conv
    merged = AMX_TILE // min(conv.in_channels // conv.groups, conv.out_channels // conv.groups)
    if conv.groups > 1 and merged > 1 and conv.groups % merged == 0:
        layer.conv = MergedConv2d(conv, merged)


@torch.no_grad()
def fold_batch_norm(layer: ViTAEConvLayer) -> None:
    """Put a layer's BatchNorm, as it is in evaluation, into the weights of its convolution, in float64."""
    conv, norm = layer.conv, layer.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    conv.bias.copy_((conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double())
    layer.norm = FoldedBatchNorm(norm).eval()


def prepare_for_inference(
    model: PreTrainedModel, dtype: torch.dtype | None = None, compile: bool = False
) -> PreTrainedModel:
    """Make a model as fast as it can be on its device. What it computes stays the same within rounding.

    The model itself is changed: evaluation mode, no gradients, BatchNorms folded into the convolutions before them,
    SiLU in place, 4-D weights in channels-last order. It can be saved: the folder holds an ordinary model with these
    weights. `from_pretrained` brings back what it was.

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
    layers = [module for module in model.modules() if isinstance(module, ViTAEConvLayer)]
    if not layers:
        raise ValueError(f"expected a ViTAE or ViTAEv2, or a model with such a backbone; got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights that are offloaded cannot be prepared: load the model without `device_map`")
    model.eval().requires_grad_(False)
    for layer in layers:
        if type(layer.norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            fold_batch_norm(layer)
        if isinstance(layer.activation_fn, nn.SiLU):
            layer.activation_fn.inplace = True
    for module in model.modules():
        if isinstance(module, (ViTAEMLP, ViTAEPyramidReduction)):
            module.activation_fn = InplaceGELU()
    if dtype is not None:
        random_projections = {
            name: buffer for name, buffer in model.named_buffers() if name.endswith("random_projection")
        }
        model.to(dtype)
        for name, buffer in random_projections.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, buffer)
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and has_amx():
        for layer in layers:
            merge_groups(layer)
    model.to(memory_format=torch.channels_last)
    if compile:
        model.compile(dynamic=False, options={"freezing": True} if model.device.type == "cpu" else None)
    return model
