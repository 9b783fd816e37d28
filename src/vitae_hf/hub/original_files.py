# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The state dict in a checkpoint of the authors, read without running code from the file."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..messages import listed, printable
from .torch_files import NoTensor, read_torch_file


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of one of the authors' `.pth` or `.pth.tar` files without running code from it.

    Takes `state_dict_ema` if there is one, else `state_dict`, `model` or the file itself; drops `module.` prefixes.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no PyTorch file, damaged, asks to run code, or holds no state dict of finite numbers.
    """
    content = read_torch_file(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    is_state_dict = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, (torch.Tensor, NoTensor)) for key, value in content.items()
    )
    if not is_state_dict or not content:
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, at the top or under `state_dict_ema`,"
            " `state_dict` or `model`"
        )
    unusable = {name: problem for name, value in content.items() if (problem := problem_of_weight(value))}
    if unusable:
        names = listed(f"{printable(name)} ({problem})" for name, problem in unusable.items())
        raise ValueError(f"{path} holds what no weight can be: {names}")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def problem_of_weight(value: torch.Tensor | NoTensor) -> str | None:
    """What keeps a value of a state dict from being a weight, if anything does."""
    if isinstance(value, NoTensor):
        return value.problem
    return None if value.isfinite().all() else "not finite"
