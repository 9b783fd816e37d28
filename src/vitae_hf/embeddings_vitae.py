# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The embeddings of the plain variants: patches, the class token if there is one, and positions, learned or fixed.

The shape key is in `layers_vitae.py`; K is the number of patches that are chosen of N.
"""

from functools import partial
from typing import Self

import torch
from torch import nn

from .configuration_vitae import ViTAEConfig
from .layers_vitae import is_program_for_all_sizes, map_to_tokens, tokens_to_map


def sin_cos_positions(grid_size: tuple[int, int], hidden_size: int) -> torch.Tensor:
    """Fixed positions of a grid, row by row. The first half of the channels encodes the column, the second the row.

    Each half holds the sines and then the cosines of the coordinate at `hidden_size / 4` frequencies, from 1 down to
    almost 1/10,000. The first entry of the table is zero and belongs to the class token.

    Args:
        grid_size: rows and columns.
        hidden_size: a multiple of 4.

    Returns:
        `(1, 1 + rows · columns, hidden_size)` in float32.

    Source: Vaswani et al. 2017, section 3.5, for one axis; He et al. 2022 for two.
    """
    rows, columns = grid_size
    count = partial(torch.arange, dtype=torch.float64, device="cpu")  # not every device has float64
    frequencies = 10000.0 ** -(count(hidden_size // 4) / (hidden_size // 4))

    def encode(length: int) -> torch.Tensor:
        angles = count(length)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, hidden_size / 2)

    by_column, by_row = encode(columns).repeat(rows, 1), encode(rows).repeat_interleave(columns, dim=0)
    table = torch.cat([by_column, by_row], dim=1)
    return nn.functional.pad(table, (0, 0, 1, 0))[None].float()


def interpolate_positions(
    positions: torch.Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> torch.Tensor:
    """Positions for a grid of another size, resampled as in ViT: bicubic, without antialiasing.

    `(1, T, C)` -> the same for the new rows and columns. The class token's position, if there is one, stays as it is.
    """
    if not is_program_for_all_sizes() and new_grid_size == grid_size:
        return positions
    num_patches = grid_size[0] * grid_size[1]
    class_position, positions = positions.split([positions.shape[1] - num_patches, num_patches], dim=1)
    grid = tokens_to_map(positions.float(), *grid_size)
    grid = nn.functional.interpolate(grid, size=new_grid_size, mode="bicubic", align_corners=False)
    return torch.cat([class_position, map_to_tokens(grid).to(class_position.dtype)], dim=1)


def select_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of each image the tokens with the given numbers, in the given order: (B, N, C), (B, K) -> (B, K, C)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class ViTAEEmbeddings(nn.Module):
    """Patches with positions, and before them the class token if there is one: (B, Cin, H·s, W·s) -> (B, T, C).

    Positions begin as zeros and are learned. In masked autoencoders (`fixed_positions`) they are sines and cosines and
    stay so.
    """

    def __init__(self, config: ViTAEConfig, fixed_positions: bool = False):
        super().__init__()
        self.fixed_positions = fixed_positions
        hidden_size, stride = config.hidden_sizes[0], config.strides[0]
        height, width = config.image_height_width
        self.image_size: tuple[int, int] = config.image_height_width
        self.grid_size: tuple[int, int] = (height // stride, width // stride)
        self.projection: nn.Conv2d = nn.Conv2d(config.num_channels, hidden_size, stride, stride=stride)
        self.cls_token: nn.Parameter | None = None
        if config.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        num_tokens = self.grid_size[0] * self.grid_size[1] + int(config.has_class_token)
        positions = torch.zeros(1, num_tokens, hidden_size)
        self.position_embeddings: nn.Parameter = nn.Parameter(positions, requires_grad=not fixed_positions)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.fixed_positions:  # here, because `from_pretrained` makes all weights trainable and then calls `eval`
            self.position_embeddings.requires_grad_(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def interpolate_pos_encoding(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Positions for another number of rows and columns, see [`interpolate_positions`]."""
        return interpolate_positions(self.position_embeddings, self.grid_size, grid_size)

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Resample the positions for images of another height and width, which become the usual ones."""
        stride = self.projection.stride[0]
        grid_size = (image_size[0] // stride, image_size[1] // stride)
        positions = self.interpolate_pos_encoding(grid_size).clone()
        self.position_embeddings = nn.Parameter(positions, requires_grad=self.position_embeddings.requires_grad)
        self.image_size, self.grid_size = image_size, grid_size

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        ids_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        patches = self.projection(pixel_values)  # (B, C, H, W)
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding((patches.shape[-2], patches.shape[-1]))
        elif (height, width) == self.image_size:
            positions = self.position_embeddings
        else:
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({self.image_size[0]}*{self.image_size[1]})."
                " Pass `interpolate_pos_encoding=True` to interpolate the position embeddings."
            )
        tokens = map_to_tokens(patches)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + positions
        if ids_keep is not None:
            tokens = torch.cat([tokens[:, :1], select_tokens(tokens[:, 1:], ids_keep)], dim=1)  # (B, 1 + K, C)
        return tokens
