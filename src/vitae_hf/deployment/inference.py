# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model changed in place so that it runs as fast as it can."""

import ctypes
import platform

import torch
from torch import nn
from transformers import PreTrainedModel

from ..training import merging
from .folding import fold_batch_norms
from .packing import WITH_ACTIVATION, owns_activation, pack_layers


class InplaceGELU(nn.Module):
    """GELU that overwrites its input, for which torch has an operation but no module."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(hidden_states)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # options of `mallopt`, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, in the whole process, so that the next forward pass can use it again.

    By default glibc returns large blocks to the system at once. The system then maps new ones page by page, which can
    take as long as the computation. With another C library or another allocator this changes nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def activate_in_place(model: nn.Module) -> None:
    """Let activations overwrite their inputs wherever nobody else sees these."""
    for module in model.modules():
        if isinstance(module, WITH_ACTIVATION) and owns_activation(module):
            if type(module.activation_fn) is nn.SiLU:
                module.activation_fn.inplace = True
            elif type(module.activation_fn) is nn.GELU:
                module.activation_fn = InplaceGELU()


def prepare_for_inference(
    model: PreTrainedModel, dtype: torch.dtype | None = None, compile: bool = False, merge_groups: bool = False
) -> PreTrainedModel:
    """Make a model as fast as it can be on its device. It computes the same as before, within rounding.

    The model itself is changed: it is put into evaluation mode without gradients, BatchNorms are folded into the
    convolutions before them, activations work in place, and 4-D weights are stored channels last. Layers that are
    quantised, adapted (by LoRA), parametrized or have hooks stay as they are. On CPUs, convolutions and linear layers
    also keep a second copy of their weights in the order that oneDNN computes with, and the C library keeps freed
    memory, in the whole process ([`keep_freed_memory`]).

    The model can be saved. The folder holds an ordinary model, which computes the same. Adapters are added, or merged,
    before a model is prepared: PEFT refuses packed layers, and its `all-linear` passes over them.

    Args:
        model: a model of this family, or one that has such a backbone, on its device.
        dtype: of the weights, such as `torch.bfloat16`; default: as they are. Random features stay float32, and
            what an R-CNN proposes and finds.
        compile: whether `torch.compile` compiles it at the first call, and again for every new size of images.
        merge_groups: whether grouped convolutions are computed with as many groups merged as is fastest, measured at
            the first call of each size ([`merge_groups`]); on CPUs, packed layers decide for themselves.

    Returns:
        The same model.

    Raises:
        ValueError: the model contains no ViTAE or ViTAEv2, or some of its weights are offloaded.

    Example:

    ```python
    >>> model = AutoModelForImageClassification.from_pretrained("org/vitae-s")
    >>> model = prepare_for_inference(model, dtype=torch.bfloat16)
    ```
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights that are offloaded cannot be prepared: load the model without `device_map`")
    fold_batch_norms(model)
    model.requires_grad_(False)
    if dtype is not None:
        float32 = set(model._keep_in_fp32_modules_strict or ()) & {name for name, _ in model.named_children()}
        for part in [child for name, child in model.named_children() if name not in float32] if float32 else [model]:
            part.to(dtype)
    if merge_groups and model.device.type != "cpu":
        merging.merge_groups(model)
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    is_cpu = model.device.type == "cpu"
    if is_cpu:
        keep_freed_memory()
    if is_cpu and not compile:  # `torch.compile` packs weights by itself
        pack_layers(model)
    activate_in_place(model)
    if compile:
        model.compile(dynamic=False, options={"freezing": True} if is_cpu else None)
    return model
