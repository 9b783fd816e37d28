# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Attention in windows that move, scale and turn (RVSA): each head looks where the content of a window tells it to.

The shape key is in `layers_vitae.py`; w is the side of a window, R×S the grid of windows, H'×W' the padded grid.

Source: Wang et al. 2022, "Advancing Plain Vision Transformer Towards Remote Sensing Foundation Model", arXiv
2208.03987, figure 4 and equations 6 to 10.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .attention_vitae import (
    ViTAEAttention,
    ViTAERelativePositions,
    distances,
    join_windows,
    split_into_windows,
    window_grid,
)
from .configuration_vitae import ViTAEConfig
from .layers_vitae import is_program_for_all_sizes, tokens_to_map, unflatten


def pad_grid(feature_map: torch.Tensor, pads: tuple[int, ...]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, H', W'), with zeros around."""
    return nn.functional.pad(feature_map, pads) if is_program_for_all_sizes() or any(pads) else feature_map


def places(length: int, device: torch.device) -> torch.Tensor:
    """Where the positions of an axis lie between -1, the first, and 1, the last."""
    return torch.arange(length, device=device, dtype=torch.float32) * (2 / (length - 1)) - 1


def at_least_one(count: Any) -> Any:
    # Not `max`, which would be a constant of a program for all sizes. The older tracer counts in tensors.
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else torch.sym_max(count, 1)


class ViTAEWindowPredictor(nn.Module):
    """Where the pixels of each window and head are looked for: (B, C, H', W') -> (B · heads, H', W', 2).

    The mean of a window decides by how much each head shifts, scales and turns the w×w points around the window's
    centre. Points are (x, y), as `grid_sample` takes them: -1 and 1 are the centres of the first and the last pixel.
    """

    def __init__(self, hidden_size: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.offsets: nn.Conv2d = nn.Conv2d(hidden_size, 2 * num_heads, 1)
        self.scales: nn.Conv2d = nn.Conv2d(hidden_size, 2 * num_heads, 1)
        self.angles: nn.Conv2d = nn.Conv2d(hidden_size, num_heads, 1)

    def by_head(self, predicted: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """(B, heads · x, R, S) -> (x, B · heads, R, 1, S, 1) in float32, ready to be spread over the pixels."""
        size = predicted.shape[1] // self.num_heads
        return predicted.float().reshape(-1, size, rows, 1, columns, 1).transpose(0, 1)

    def forward(self, feature_map: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`height` and `width` are those of the grid before it was padded."""
        window_size, device = self.window_size, feature_map.device
        rows, columns, _ = window_grid(height, width, window_size)
        windows = unflatten(unflatten(feature_map, 3, (columns, window_size)), 2, (rows, window_size))
        means = nn.functional.leaky_relu(windows.mean((3, 5)))  # (B, C, R, S)
        offset_x, offset_y = self.by_head(self.offsets(means), rows, columns)
        scale_x, scale_y = self.by_head(self.scales(means), rows, columns)
        (angle,) = self.by_head(self.angles(means), rows, columns)
        # The authors divide by the windows that fit into the grid. One that is smaller than a window counts as one.
        offset_x = offset_x / at_least_one(width // window_size)
        offset_y = offset_y / at_least_one(height // window_size)
        y = places(rows * window_size, device).view(1, rows, window_size, 1, 1)
        x = places(columns * window_size, device).view(1, 1, 1, columns, window_size)
        centre_y, centre_x = y.mean(2, keepdim=True), x.mean(4, keepdim=True)
        y, x = (y - centre_y) * (1 + scale_y), (x - centre_x) * (1 + scale_x)
        sine, cosine = angle.sin(), angle.cos()
        turned_x, turned_y = x * cosine - y * sine, x * sine + y * cosine  # (B · heads, R, w, S, w)
        points = torch.stack([turned_x + centre_x + offset_x, turned_y + centre_y + offset_y], dim=-1)
        return points.view(-1, rows * window_size, columns * window_size, 2)


class ViTAERotatedWindowAttention(ViTAEAttention):
    """Softmax attention of the queries of a window to keys and values from a window that each head places: (B, N, C).

    Keys and values are interpolated between the tokens, and are zero outside of the grid. Scores have two more terms:
    the query's for rows and columns between it and the key ([`ViTAERelativePositions`], here without the scaling of
    scores), and one for both distances together, as Swin has it.

    Args:
        is_apart: whether keys and values are looked for at different places.
    """

    window_size: int
    relative_positions: ViTAERelativePositions

    def __init__(self, config: ViTAEConfig, hidden_size: int, num_heads: int, window_size: int, is_apart: bool):
        super().__init__(
            config,
            hidden_size,
            hidden_size,
            num_heads,
            config.qkv_bias,
            window_size,
            rel_pos_size=(window_size, window_size),
        )
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.key_windows = ViTAEWindowPredictor(hidden_size, num_heads, window_size)
        self.value_windows = ViTAEWindowPredictor(hidden_size, num_heads, window_size) if is_apart else None

    def score_bias(self, query: torch.Tensor) -> torch.Tensor:
        """What is added to scores: (B · R · S, heads, w², D) -> (B · R · S, heads, w², w²)."""
        window_size = self.window_size
        apart = distances(window_size, query.device)
        index = apart.view(window_size, 1, window_size, 1) * (2 * window_size - 1) + apart.view(1, window_size, 1, -1)
        bias = self.relative_position_bias[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)  # (heads, w², w²)
        return self.relative_positions(query, window_size, window_size) + bias

    def sample(self, states: torch.Tensor, points: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (B, N, C) at the points of each window and head: (B · R · S, heads, w², D)."""
        batch, _, channels = states.shape
        rows, columns, pads = window_grid(height, width, self.window_size)
        feature_map = pad_grid(tokens_to_map(states, height, width), pads)
        feature_map = feature_map.reshape(-1, self.head_dim, *feature_map.shape[-2:])  # (B · heads, D, H', W')
        with maybe_autocast(device_type=states.device.type, enabled=False):  # places need more digits than bfloat16 has
            sampled = nn.functional.grid_sample(feature_map.float(), points, align_corners=True).to(states.dtype)
        num_heads, size = channels // self.head_dim, self.window_size
        windows = sampled.view(batch, num_heads, self.head_dim, rows, size, columns, size).permute(0, 3, 5, 1, 4, 6, 2)
        windows = windows.clone(memory_format=torch.contiguous_format)  # as in `split_into_windows`
        return windows.view(batch * rows * columns, num_heads, size**2, self.head_dim)

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, window_size = hidden_states.shape[0], self.window_size
        _, _, pads = window_grid(height, width, window_size)
        feature_map = pad_grid(tokens_to_map(hidden_states, height, width), pads)
        key_points = self.key_windows(feature_map, height, width)
        value_points = key_points if self.value_windows is None else self.value_windows(feature_map, height, width)
        query = self.split_heads(split_into_windows(self.q_proj(hidden_states), height, width, window_size))
        key = self.sample(self.k_proj(hidden_states), key_points, height, width)
        value = self.sample(self.v_proj(hidden_states), value_points, height, width)
        output, weights = self.attend(query, key, value, self.score_bias(query), **kwargs)
        return join_windows(output, batch, height, width, window_size), weights
