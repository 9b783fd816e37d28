# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' settings of the optimizer: which weights decay, the learning rate of each layer, and the schedule."""

import math
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


_LAYER = re.compile(r"(?:^|\.)(embeddings|stages\.\d+\.(?:reduction_cell|normal_cells\.\d+))\.")
_UNDECAYED = ("cls_token", "mask_token", "position_embeddings", "rel_pos_h", "rel_pos_w", "relative_position_bias")
REFERENCE_BATCH_SIZE = 512  # images of the updates that recipes state their rates and decays for, as the authors do


def scaled_learning_rate(base_learning_rate: float, global_batch_size: int) -> float:
    """The linear scaling rule: `base · batch / 512`.

    He et al. 2022 state the rates of masked autoencoders for 256 images; the recipes here state all rates for 512, so
    that their 3e-4 is the paper's 1.5e-4.
    """
    return base_learning_rate * global_batch_size / REFERENCE_BATCH_SIZE


def scaled_ema_decay(base_ema_decay: float, global_batch_size: int) -> float:
    """The decay of the average for larger and thus fewer updates: `base ^ (batch / 512)`."""
    return base_ema_decay ** (global_batch_size / REFERENCE_BATCH_SIZE)


def layer_names(model: nn.Module) -> list[str]:
    """The layers of a model in order of depth: embeddings or reduction cells and normal cells, then the head."""
    matches = (_LAYER.search(name) for name, _ in model.named_parameters())
    return [*dict.fromkeys(match.group(1) for match in matches if match), "head"]


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters in groups of equal learning rate and weight decay, for any torch optimizer.

    Biases, norms, class and mask tokens, and positions, relative ones too, do not decay. With a layer decay below 1
    the head learns at the full rate and each layer below it at `layer_decay` times the rate of the one above, which is
    what fine-tuning after masked-autoencoder pretraining uses. Frozen parameters are left out.

    Args:
        model: a ViTAE model with or without a head, or one wrapped by PEFT or DDP.
        learning_rate: of the head.
        weight_decay: of the parameters that decay.
        layer_decay: 1 for one learning rate everywhere.

    Returns:
        Groups with `params`, `names` (of these parameters), `lr` and `weight_decay`, from the lowest layer to the head.

    Raises:
        ValueError: `layer_decay` is not above 0 and at most 1.

    Source: Clark et al. 2020, ELECTRA; Bao et al. 2021, BEiT.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {layer_decay}")
    layers = layer_names(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = _LAYER.search(name)
        below_head = layers.index(match.group(1) if match else "head") - (
            len(layers) - 1
        )  # 0 for the head, else negative
        decays = parameter.ndim > 1 and not name.endswith(_UNDECAYED)
        key = (below_head if layer_decay < 1 else 0, decays)
        group = groups.setdefault(key, {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "lr": learning_rate * layer_decay**-below_head, "weight_decay": weight_decay if decays else 0.0}
        for (below_head, decays), group in sorted(groups.items())
    ]


def share(part: float, whole: float) -> float:
    """What part of a learning rate another one is, at most 1; of a rate of 0, with which nothing is trained, 1."""
    return min(part / whole, 1.0) if whole else 1.0


def cosine_factor(step: int, *, steps: int, warmup_steps: int, warmup_factor: float, floor_factor: float) -> float:
    """A step's share of the full learning rate: a linear rise, a cosine that counts from step 0, then the floor."""
    if step < warmup_steps:
        return warmup_factor + (1 - warmup_factor) * step / warmup_steps
    if step >= steps:
        return floor_factor
    return floor_factor + (1 - floor_factor) * (1 + math.cos(math.pi * step / steps)) / 2


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    warmup_learning_rate: float = 1e-6,
    floor: float = 1e-5,
) -> LambdaLR:
    """The authors' schedule, stepped once per update: linear warm-up, cosine to a floor, cool-down at the floor.

    As in timm, the cosine counts its `steps` from the first update, and the warm-up replaces its beginning. Updates
    after `steps` are the cool-down. Groups with a smaller learning rate follow in proportion.

    Args:
        learning_rate: the full one. `warmup_learning_rate` and `floor` are rates too, at most as large.
        steps: updates until the floor is reached.
    """
    shape = partial(
        cosine_factor,
        steps=steps,
        warmup_steps=warmup_steps,
        warmup_factor=share(warmup_learning_rate, learning_rate),
        floor_factor=share(floor, learning_rate),
    )
    return LambdaLR(optimizer, shape)


def step_factor(step: int, *, steps: list[int], warmup_steps: int, warmup_factor: float) -> float:
    """A step's share of the full learning rate: a linear rise, then a tenth of what it was after each of `steps`."""
    if step < warmup_steps:
        return warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return 0.1 ** sum(step >= passed for passed in steps)


def step_schedule(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    steps: list[int],
    warmup_steps: int = 0,
    warmup_learning_rate: float = 1e-6,
) -> LambdaLR:
    """The schedule of detectors, stepped once per update: linear warm-up, then a tenth of the rate after each step.

    Args:
        learning_rate: the full one, and `warmup_learning_rate` that of the first update.
        steps: updates after each of which the rate is divided by ten.
    """
    warmup_factor = share(warmup_learning_rate, learning_rate)
    shape = partial(step_factor, steps=steps, warmup_steps=warmup_steps, warmup_factor=warmup_factor)
    return LambdaLR(optimizer, shape)
