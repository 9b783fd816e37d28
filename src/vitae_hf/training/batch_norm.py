# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""BatchNorm in training: batches that it cannot normalise, statistics that stay, statistics that processes share."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: torch.nn.Module) -> None:
    """Put every BatchNorm into evaluation mode: it normalises by the statistics it has, and its weights still learn."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def share_statistics(model: torch.nn.Module) -> None:
    """Give all processes the buffers of the first.

    Without this the statistics differ. Under FSDP each process has those of its own batches. DDP shares them before
    each forward pass, and the pass adds the batch of the process to them.
    """
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)


@torch.no_grad()
def one_value_norms(model: torch.nn.Module, pixel_values: torch.Tensor) -> list[str]:
    """Names of the BatchNorms that see maps of one pixel when the model gets this picture `(1, 3, height, width)`.

    BatchNorms that would not compute statistics in training do not count. The forward pass runs in evaluation mode, so
    that it changes no statistics, and leaves the random state as it was; the model is in training mode afterwards.
    """
    norms: dict[torch.nn.Module, str] = {}
    found: list[str] = []
    for name, module in model.train().named_modules():
        if isinstance(module, _BatchNorm) and module.training and not getattr(module, "is_frozen", False):
            norms[module] = name

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0][0, 0].numel() == 1:
            found.append(norms[module])

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    devices = [pixel_values.device] if pixel_values.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # a masked autoencoder draws its mask
            model.eval()(pixel_values=pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    return found
