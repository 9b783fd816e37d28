# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The networks of `compare_claims.py`: the tiny ViTAE and ViTAEv2, each with a piece taken out, and Swin and ViT.

Pieces that a field of the configuration describes are taken out by it, the others by putting another module or another
order of the same modules in. Where that makes a network smaller, a second one of about the first size has wider MLPs,
and branches where it has some, whose width follows that of the MLPs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from compare_fashion_mnist import swin, vit
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from vitae_hf import config_from_preset
from vitae_hf.configuration_vitae import ViTAEFamilyConfig
from vitae_hf.layers_vitae import ViTAEFamilyNormalCell, ViTAEFamilyReductionCell
from vitae_hf.modeling_vitaev2 import ViTAEv2ReductionCell


class NoBranch(nn.Module):
    """Zeros in place of a convolution branch: (B, Cin, H·s, W·s) -> (B, C, H, W)."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = feature_map.shape
        return feature_map.new_zeros(batch, self.channels, height // self.stride, width // self.stride)


class BranchFirst(ViTAEFamilyNormalCell):
    """A normal cell with its convolution branch before attention."""

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.convolve(hidden_states, height, width)
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states), height, width)[0]
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class AttentionFirst(ViTAEFamilyNormalCell):
    """A normal cell with its convolution branch between attention and the MLP."""

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states), height, width)[0]
        hidden_states = hidden_states + self.convolve(hidden_states, height, width)
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


def cells(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int, int]]:
    """Every cell with its stage's width and stride; a normal cell has stride 1."""
    for stage_idx, stage in enumerate(model.base_model.stages):
        width, stride = model.config.hidden_sizes[stage_idx], model.config.strides[stage_idx]
        yield stage.reduction_cell, width, stride
        yield from ((cell, width, 1) for cell in stage.normal_cells)


def without_branch(model: PreTrainedModel) -> None:
    """Take the convolution branches out of all cells. Every cell keeps a way around its attention."""
    for cell, width, stride in cells(model):
        if isinstance(cell, (ViTAEFamilyReductionCell, ViTAEFamilyNormalCell)):
            cell.conv_branch = NoBranch(width, stride)
        if isinstance(cell, ViTAEv2ReductionCell):  # in those with windows the branch was the only way
            cell.attention.value_residual = True


def in_order(cell_class: type[ViTAEFamilyNormalCell]) -> Callable[[PreTrainedModel], None]:
    """Compute the normal cells in another order; they keep their layers."""

    def change(model: PreTrainedModel) -> None:
        for cell, *_ in cells(model):
            if isinstance(cell, ViTAEFamilyNormalCell):
                cell.__class__ = cell_class

    return change


def dilations_of_one(config: ViTAEFamilyConfig) -> dict:
    """No pyramid: its convolutions see one scale, and are together one strided convolution of equal width."""
    return {"reduction_dilations": tuple((1,) * len(dilations) for dilations in config.reduction_dilations)}


def build(
    preset: str, fields: Callable[[ViTAEFamilyConfig], dict] = lambda _: {}, change=lambda _: None, mlp_ratio=2.0
):
    config = config_from_preset(preset)
    config = config_from_preset(preset, **fields(config), mlp_ratio=mlp_ratio)
    model = AutoModelForImageClassification.from_config(config)
    change(model)
    return model


def of_equal_size(preset: str, **ablation) -> PreTrainedModel:
    """The ablation with MLPs so wide that it has about as many parameters as the whole network."""
    size = build(preset).num_parameters()
    ratios = [2.0 + quarter / 4 for quarter in range(17)]  # `conv_groups` must divide the widths
    sizes = {ratio: build(preset, **ablation, mlp_ratio=ratio).num_parameters() for ratio in ratios}
    return build(preset, **ablation, mlp_ratio=min(ratios, key=lambda ratio: abs(sizes[ratio] - size)))


ABLATIONS: dict[str, dict] = {
    "no branch": {"change": without_branch},
    "dilations of 1": {"fields": dilations_of_one},
    "branch before attention": {"change": in_order(BranchFirst)},
    "branch after attention": {"change": in_order(AttentionFirst)},
}


def family(preset: str) -> dict[str, Callable[[], PreTrainedModel]]:
    """The network of a preset and its ablations."""
    networks = {preset: lambda: build(preset)}
    for name, ablation in ABLATIONS.items():
        networks[f"{preset}, {name}"] = lambda ablation=ablation: build(preset, **ablation)
        if name == "no branch":
            networks[f"{preset}, {name}, same size"] = lambda ablation=ablation: of_equal_size(preset, **ablation)
    return networks


NETWORKS = {**family("vitae-nano"), "swin": partial(swin, drop_path_rate=0.0), "vit": vit, **family("vitaev2-nano")}
WHOLE = ("vitae-nano", "vitaev2-nano", "swin", "vit")
