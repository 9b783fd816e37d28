# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Programs for images of one size, of runtimes for which transformers has no exporter."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from . import aotinductor, coreml, litert


RUNTIMES: dict[str, ModuleType] = {"litert": litert, "coreml": coreml, "torch-aoti": aotinductor}
"""Each format, and the module that writes and loads it."""


class NamedTensors(nn.Module):
    """A model from `pixel_values` alone to a dictionary of tensors, as the converters of other runtimes want it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.names = ("logits",) if hasattr(model, "classifier") else ("last_hidden_state", "pooler_output")

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(pixel_values)
        return {name: outputs[name] for name in self.names}


class FixedSizeProgram:
    """A loaded program, which can be called like the model that it was made from, with images of its own size."""

    def __init__(self, run: Callable[[torch.Tensor], dict[str, torch.Tensor]], shape: list[int | None]):
        self.run = run
        self.shape = shape

    def __call__(self, pixel_values: torch.Tensor, **options: Any) -> ModelOutput:
        """
        Args:
            options: of the model; at its own size they change nothing.

        Raises:
            ValueError: the images have another size, or are more than the program takes.
        """
        found = list(pixel_values.shape)
        if len(found) != 4 or any(expected not in (None, side) for side, expected in zip(found, self.shape)):
            raise ValueError(f"this program takes `pixel_values` of {readable(self.shape)}, got {readable(found)}")
        outputs = self.run(pixel_values.contiguous())
        return ModelOutput(outputs)


def readable(shape: Sequence[int | None]) -> str:
    """A shape in words: `any × 3 × 224 × 224`."""
    return " × ".join("any" if side is None else str(side) for side in shape)


@torch.no_grad()
def write_program(model: PreTrainedModel, format: str, folder: Path) -> dict[str, Any]:
    """Write a model in evaluation mode as a program for images of the size of its configuration.

    Returns:
        What [`load_program`] has to know: the format, and the shape of the images, with none where any number goes.
    """
    runtime = RUNTIMES[format]
    shape = (1, model.config.num_channels, *model.config.image_height_width)
    runtime.write(NamedTensors(model).eval(), torch.zeros(shape), folder / runtime.FILE)
    return {"export_format": format, "shape": [None if runtime.IS_BATCH_OPEN else 1, *shape[1:]]}


def load_program(folder: Path, manifest: dict[str, Any], **options: Any) -> FixedSizeProgram:
    """Load what [`write_program`] wrote, given what it returned; the options are those of the format's `load`."""
    runtime = RUNTIMES[manifest["export_format"]]
    return FixedSizeProgram(runtime.load(folder / runtime.FILE, **options), manifest["shape"])
