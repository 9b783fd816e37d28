# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Programs of LiteRT, for Android, iOS and microcontrollers (once TensorFlow Lite)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


FILE = "model.tflite"
IS_BATCH_OPEN = False


def write(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Convert a network from `pixel_values` to named tensors; the example has the size of every image."""
    import litert_torch

    litert_torch.convert(network, sample_kwargs={"pixel_values": example}).export(str(path))


def load(path: Path, threads: int | None = None) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function from `pixel_values` to the named tensors.

    Args:
        threads: how many compute; default: LiteRT's own choice, one.
    """
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path), num_threads=threads).get_signature_runner()

    def predict(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = run(pixel_values=pixel_values.numpy())
        return {name: torch.from_numpy(output) for name, output in outputs.items()}

    return predict


def why_not_here() -> str | None:
    """Why programs of this format cannot run on this machine, or none if they can."""
    return None
