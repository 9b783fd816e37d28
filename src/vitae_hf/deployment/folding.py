# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""BatchNorms folded into the convolutions before them, for inference."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers_vitae import ViTAEBatchNorm2d, ViTAEConvLayer, is_untouched


class FoldedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that does nothing in evaluation mode, since the convolution before it does its work.

    Its weights and statistics are such that an ordinary BatchNorm does nothing with them either. A saved folder
    therefore gives the same function when it is loaded as the ordinary network.
    """

    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, norm: ViTAEBatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
        self.running_var.fill_(1 - norm.eps)
        self.num_batches_tracked.copy_(norm.num_batches_tracked)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map) if self.training else feature_map


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear layer or convolution of torch's own, not quantised, adapted or parametrized."""
    if type(layer) not in (nn.Linear, nn.Conv2d) or type(layer.weight) is not nn.Parameter:
        return False
    return layer.weight.is_floating_point() and layer.weight.layout == torch.strided and is_untouched(layer)


def can_fold(layer: ViTAEConvLayer) -> bool:
    """Whether a layer has a plain convolution, and after it a BatchNorm with weights and statistics."""
    norm = layer.norm
    if type(norm) not in (ViTAEBatchNorm2d, nn.SyncBatchNorm) or norm.weight is None or norm.running_var is None:
        return False
    return is_plain(layer.conv) and is_untouched(norm)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on the CPU, since not every device has float64."""
    return tensor.cpu().double()


@torch.no_grad()
def fold_batch_norm(layer: ViTAEConvLayer) -> None:
    """Multiply a layer's BatchNorm into the weights of its convolution, in float64."""
    conv: Any = layer.conv  # with a bias; to torch that is a tensor or nothing
    norm: Any = layer.norm
    scale = exact(norm.weight) / (exact(norm.running_var) + norm.eps).sqrt()
    weight = exact(conv.weight) * scale[:, None, None, None]
    bias = (exact(conv.bias) - exact(norm.running_mean)) * scale + exact(norm.bias)
    conv.weight.copy_(weight.to(conv.weight.dtype))
    conv.bias.copy_(bias.to(conv.bias.dtype))
    layer.norm = FoldedBatchNorm(norm).eval()


def fold_batch_norms(model: PreTrainedModel) -> None:
    """Put a model into evaluation mode and fold its BatchNorms into the convolutions before them.

    Raises:
        ValueError: the model contains no ViTAE or ViTAEv2.
    """
    layers = [module for module in model.modules() if isinstance(module, ViTAEConvLayer)]
    if not layers:
        raise ValueError(f"expected a ViTAE or ViTAEv2, or a model with such a backbone; got {type(model).__name__}")
    model.eval()
    for layer in filter(can_fold, layers):
        fold_batch_norm(layer)
