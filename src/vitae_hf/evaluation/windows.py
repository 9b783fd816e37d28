# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Segmentation of pictures that are larger than those in training: in windows that overlap, as aerial pictures are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers.modeling_outputs import SemanticSegmenterOutput


@dataclass(frozen=True)
class Windows:
    """Square windows over a picture. Where they overlap, the logits of a pixel are their mean.

    Args:
        size: side of a window in pixels, that of the crops in training. A smaller picture is one window.
        stride: pixels from one window to the next. The last one of a row ends where the picture does.

    Raises:
        ValueError: there would be no windows, or gaps between them.

    Example:

    ```python
    >>> Windows(512, 384).starts(1024)
    [0, 384, 512]
    ```

    Source: mmsegmentation's `slide_inference`.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise ValueError(
                f"windows must be at least 1 pixel apart and at most their size; got {self.stride} for {self.size}"
            )

    def starts(self, length: int) -> list[int]:
        """Where windows begin on a side of this many pixels."""
        last = max(length - self.size, 0)
        return [*range(0, last, self.stride), last]

    @torch.no_grad()
    def outputs(self, model: Any, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        """What a segmenter gives for pictures `(B, 3, H, W)`: `logits` `(B, classes, H, W)` in float32.

        Raises:
            ValueError: a window is too small for the network.
        """
        height, width = pixel_values.shape[-2:]
        total = pixel_values.new_zeros(len(pixel_values), model.config.num_labels, height, width, dtype=torch.float32)
        count = total.new_zeros(height, width)
        for top in self.starts(height):
            for left in self.starts(width):
                window = (..., slice(top, top + self.size), slice(left, left + self.size))
                logits = self._looked_at(model, pixel_values[window])
                total[window] += interpolate(logits, total[window].shape[-2:], mode="bilinear")
                count[window] += 1
        return SemanticSegmenterOutput(logits=total / count)

    @staticmethod
    def _looked_at(model: Any, window: torch.Tensor) -> torch.Tensor:
        try:
            return model(pixel_values=window).logits.float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            size = "×".join(map(str, window.shape[-2:]))
            raise ValueError(f"the network cannot look at a window of {size} pixels: {error}") from error
