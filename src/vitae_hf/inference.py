# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model made ready to be used as fast as it can be."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers_vitae import ViTAEConvLayer


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
    if dtype is not None:
        random_projections = {
            name: buffer for name, buffer in model.named_buffers() if name.endswith("random_projection")
        }
        model.to(dtype)
        for name, buffer in random_projections.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, buffer)
    model.to(memory_format=torch.channels_last)
    if compile:
        model.compile(dynamic=False)
    return model
