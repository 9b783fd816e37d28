# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Programs of Core ML, for iOS 17, macOS 14 and newer. Any system writes them, macOS and iOS alone run them."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


FILE = "model.mlpackage"
IS_BATCH_OPEN = False


def write(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Convert a network from `pixel_values` to named tensors, in float32; the example has the size of every image."""
    import coremltools

    program = torch.export.export(network, (), {"pixel_values": example}, strict=False).run_decompositions({})
    names = list(network(example))
    coremltools.convert(
        program,
        outputs=[coremltools.TensorType(name=name) for name in names],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    ).save(str(path))


def load(path: Path, **options: Any) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function from `pixel_values` to the named tensors, on macOS.

    Args:
        options: of `coremltools.models.MLModel`, such as `compute_units`.
    """
    import coremltools

    model = coremltools.models.MLModel(str(path), **options)

    def predict(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = model.predict({"pixel_values": pixel_values.numpy()})
        return {name: torch.from_numpy(output) for name, output in outputs.items()}

    return predict


def why_not_here() -> str | None:
    """Why programs of this format cannot run on this machine, or none if they can."""
    return None if platform.system() == "Darwin" else "Core ML runs on macOS and iOS alone"
