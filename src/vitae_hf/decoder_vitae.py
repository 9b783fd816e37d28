# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a masked autoencoder adds to a class-token variant: fixed positions, masks, patches as targets, the decoder.

Shape key: as in `layers_vitae.py`, and K visible patches of N, p the side of a patch, C channels of the encoder's
tokens, D of the decoder's.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vitae import ViTAEConfig
from .layers_vitae import ViTAEAttention, ViTAEMLP, map_to_tokens, serves_all_sizes, tokens_to_map


def sin_cos_positions(grid_size: tuple[int, int], hidden_size: int) -> torch.Tensor:
    """Fixed positions of a grid, row by row: the first half of the channels tells the column, the second the row.

    Each half is the sine and then the cosine of the coordinate at `hidden_size / 4` frequencies, 1 down to almost
    1/10,000. The class token's entry, the first, is zero.

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
    """Positions for another grid, as ViT resamples them (bicubic, no antialiasing), the class token's kept.

    `(1, 1 + rows · columns, C)` -> the same for the new rows and columns.
    """
    if not serves_all_sizes() and new_grid_size == grid_size:
        return positions
    class_position, positions = positions.split([1, positions.shape[1] - 1], dim=1)
    grid = tokens_to_map(positions.float(), *grid_size)
    grid = nn.functional.interpolate(grid, size=new_grid_size, mode="bicubic", align_corners=False)
    return torch.cat([class_position, map_to_tokens(grid).to(class_position.dtype)], dim=1)


def select_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The tokens with these numbers, in this order, of each image: (B, N, C), (B, K) -> (B, K, C)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def random_mask(noise: torch.Tensor, mask_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which patches stay visible: those with the least noise, `N · (1 - mask_ratio)` of them, rounded down.

    Args:
        noise: `(B, N)`.
        mask_ratio: share of the patches to hide.

    Returns:
        `ids_keep` `(B, K)`, numbers of the visible patches; `ids_restore` `(B, N)`, the place of each patch among the
        visible ones and, after them, the masked ones; `mask` `(B, N)`, 0 for visible and 1 for masked.

    Raises:
        ValueError: no patch stays visible, or none is masked.
    """
    num_patches = noise.shape[1]
    num_visible = int(num_patches * (1 - mask_ratio) + 1e-6)  # 10 · (1 - 0.9) is 1
    if not 0 < num_visible < num_patches:
        raise ValueError(
            f"`mask_ratio` {mask_ratio} leaves {num_visible} of {num_patches} patches visible; there must be at least"
            " one that is and one that is not"
        )
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :num_visible], ids_restore, (ids_restore >= num_visible).float()


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, channels, H·p, W·p) -> (B, N, p²·channels): the pixels of a patch row by row, their channels innermost."""
    blocks = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, channels, H, p, W, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, patch_size: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`patchify`], for a grid of so many rows and columns."""
    blocks = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid_size)  # (B, H, W, p, p, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, `(B, N, 1)`, which `norm_pix_loss` normalises its targets by."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_patch_loss(
    pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, patch_size: int, norm_pix_loss: bool
) -> torch.Tensor:
    """Mean squared error of the masked patches, in float32.

    Args:
        pixel_values: `(B, channels, H·p, W·p)`.
        logits: `(B, N, p²·channels)`.
        mask: `(B, N)`, 1 for the patches that count.
        norm_pix_loss: whether the targets are normalised patch by patch.

    Source: He et al. 2022, section 3, "Reconstruction target".
    """
    target = patchify(pixel_values.float(), patch_size)
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (logits.float() - target).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class ViTAEDecoderLayer(GradientCheckpointingLayer):
    """A plain transformer block, without a convolution branch: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        hidden_size = config.decoder_hidden_size
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAEAttention(config, hidden_size, hidden_size, config.decoder_num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTAEMLP(hidden_size, config.decoder_intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states), height, width)
        hidden_states = hidden_states + attention
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViTAEDecoder(nn.Module):
    """From the encoded visible patches to the pixels of all: (B, 1 + K, C) -> (B, N, p²·channels).

    Every masked patch is one and the same learned token, told apart by its position.

    Source: He et al. 2022, section 3, "MAE decoder".
    """

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        hidden_size, self.patch_size = config.decoder_hidden_size, config.total_stride
        self.grid_size = tuple(side // self.patch_size for side in config.image_height_width)
        self.embedding = nn.Linear(config.hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = sin_cos_positions(self.grid_size, hidden_size).to(torch.get_default_dtype())
        self.register_buffer("position_embeddings", positions)
        self.layers = nn.ModuleList(ViTAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.prediction = nn.Linear(hidden_size, self.patch_size**2 * config.num_channels)

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Make another image size the one that positions are for."""
        grid_size = tuple(side // self.patch_size for side in image_size)
        self.position_embeddings = interpolate_positions(self.position_embeddings, self.grid_size, grid_size).clone()
        self.grid_size = grid_size

    def forward(self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Args: encoded tokens, the class token first; `ids_restore` of [`random_mask`]; rows and columns of N."""
        class_token, visible = self.embedding(hidden_states).split([1, hidden_states.shape[1] - 1], dim=1)
        masked = self.mask_token.to(visible.dtype).expand(visible.shape[0], ids_restore.shape[1] - visible.shape[1], -1)
        tokens = select_tokens(torch.cat([visible, masked], dim=1), ids_restore)  # (B, N, D)
        positions = interpolate_positions(self.position_embeddings, self.grid_size, (height, width))
        hidden_states = torch.cat([class_token, tokens], dim=1) + positions
        for layer in self.layers:
            hidden_states = layer(hidden_states, height, width)
        return self.prediction(self.layernorm(hidden_states[:, 1:]))
