# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a masked autoencoder adds to a plain variant with a class token: random masks, the loss, and the decoder.

Shape key: as in `layers_vitae.py`, and K visible patches of N, p the side of a patch, C channels of the encoder's
tokens, D of the decoder's.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_vitae import ViTAEAttention
from .configuration_vitae import ViTAEConfig
from .embeddings_vitae import interpolate_positions, select_tokens, sin_cos_positions
from .layers_vitae import ViTAEMLP


def random_mask(noise: torch.Tensor, mask_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the visible patches: the `N · (1 - mask_ratio)` patches with the lowest noise, rounded down.

    Args:
        noise: `(B, N)`.
        mask_ratio: share of the patches to hide.

    Returns:
        `ids_keep` `(B, K)`, the numbers of the visible patches; `ids_restore` `(B, N)`, the position of each patch in
        the order that has all visible patches first; `mask` `(B, N)`, 0 for visible and 1 for masked patches.

    Raises:
        ValueError: no patch stays visible, or none is masked.
    """
    num_patches = noise.shape[1]
    # In floating point 10 · (1 - 0.9) is slightly less than 1. The 1e-6 keeps that from being rounded down to 0.
    num_visible = int(num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < num_visible < num_patches:
        raise ValueError(
            f"`mask_ratio` {mask_ratio} leaves {num_visible} of {num_patches} patches visible; there must be at least"
            " one that is and one that is not"
        )
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :num_visible], ids_restore, (ids_restore >= num_visible).float()


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches: (B, channels, H·p, W·p) -> (B, N, p²·channels), row by row, channels innermost."""
    blocks = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, channels, H, p, W, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, patch_size: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`patchify`]. `grid_size` is the number of rows and columns of patches."""
    blocks = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid_size)  # (B, H, W, p, p, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, `(B, N, 1)`, by which `norm_pix_loss` normalises the targets."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_patch_loss(
    pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, patch_size: int, norm_pix_loss: bool
) -> torch.Tensor:
    """Mean squared error of the pixels of the masked patches, in float32.

    Args:
        pixel_values: `(B, channels, H·p, W·p)`.
        logits: `(B, N, p²·channels)`.
        mask: `(B, N)`, 1 for a masked patch, 0 for a visible one.
        norm_pix_loss: whether each patch of the target is normalised by its own mean and standard deviation.

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
        self.layernorm_before: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention: ViTAEAttention = ViTAEAttention(
            config, hidden_size, hidden_size, config.decoder_num_attention_heads
        )
        self.layernorm_after: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp: ViTAEMLP = ViTAEMLP(hidden_size, config.decoder_intermediate_size)
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states), height, width)
        hidden_states = hidden_states + attention
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViTAEDecoder(nn.Module):
    """Predicts the pixels of all patches from the tokens of the visible ones: (B, 1 + K, C) -> (B, N, p²·channels).

    All masked patches start as the same learned token. Only the position that is added tells them apart.

    Source: He et al. 2022, section 3, "MAE decoder".
    """

    patch_size: int
    position_embeddings: torch.Tensor

    def __init__(self, config: ViTAEConfig):
        super().__init__()
        hidden_size, self.patch_size = config.decoder_hidden_size, config.total_stride
        self.grid_size: tuple[int, int] = self.grid_of(config.image_height_width)
        self.embedding: nn.Linear = nn.Linear(config.hidden_size, hidden_size)
        self.mask_token: nn.Parameter = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = sin_cos_positions(self.grid_size, hidden_size).to(self.mask_token)  # its device and dtype
        self.register_buffer("position_embeddings", positions)
        self.layers: nn.ModuleList = nn.ModuleList(
            ViTAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm: nn.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.prediction: nn.Linear = nn.Linear(hidden_size, self.patch_size**2 * config.num_channels)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of an image of this height and width."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Resample the positions for images of another height and width, which become the usual ones."""
        grid_size = self.grid_of(image_size)
        self.position_embeddings = interpolate_positions(self.position_embeddings, self.grid_size, grid_size).clone()
        self.grid_size = grid_size

    def forward(self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, 1 + K, C) -> (B, N, p²·channels).

        Args:
            hidden_states: encoded tokens, the class token first.
            ids_restore: as [`random_mask`] returns it.
            height, width: rows and columns of the N patches.
        """
        class_token, visible = self.embedding(hidden_states).split([1, hidden_states.shape[1] - 1], dim=1)
        masked = self.mask_token.to(visible.dtype).expand(visible.shape[0], ids_restore.shape[1] - visible.shape[1], -1)
        tokens = select_tokens(torch.cat([visible, masked], dim=1), ids_restore)  # (B, N, D)
        positions = interpolate_positions(self.position_embeddings, self.grid_size, (height, width))
        hidden_states = torch.cat([class_token, tokens], dim=1) + positions
        for layer in self.layers:
            hidden_states = layer(hidden_states, height, width)
        return self.prediction(self.layernorm(hidden_states[:, 1:]))
