# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The two kinds of attention: softmax attention, over all tokens or inside windows, and random-feature attention.

The shape key is in `layers_vitae.py`.

Source: Choromanski et al. 2021, "Rethinking Attention with Performers" (random features); Liu et al. 2021, "Swin
Transformer" (windows).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.linalg import vector_norm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast

from .configuration_vitae import ViTAEConfig, ViTAEFamilyConfig
from .layers_vitae import ViTAEDropout, is_program_for_all_sizes, pyramid_size, unflatten


def window_grid(height: int, width: int, window_size: int, padding: str = "both") -> tuple[int, int, tuple[int, ...]]:
    """How windows cover a grid of tokens.

    Args:
        padding: `"both"` sides of the grid are padded, each by half, or it is padded at the `"end"`.

    Returns:
        Rows and columns of windows, and the padding (left, right, top, bottom) that the grid needs to fill them.
    """
    rows, columns = (height + window_size - 1) // window_size, (width + window_size - 1) // window_size
    pad_height, pad_width = rows * window_size - height, columns * window_size - width
    top, left = (pad_height // 2, pad_width // 2) if padding == "both" else (0, 0)
    return rows, columns, (left, pad_width - left, top, pad_height - top)


def split_into_windows(
    tokens: torch.Tensor, height: int, width: int, window_size: int, padding: str = "both"
) -> torch.Tensor:
    """(B, N, C) -> (B · windows, window_size², C). The grid is padded with zeros, where [`window_grid`] says."""
    batch, _, channels = tokens.shape
    rows, columns, pads = window_grid(height, width, window_size, padding)
    grid = unflatten(tokens, 1, (height, width))
    if is_program_for_all_sizes() or any(pads):
        grid = nn.functional.pad(grid, (0, 0, *pads))
    grid = grid.view(batch, rows, window_size, columns, window_size, channels).transpose(2, 3)
    # `clone` always copies. `reshape` copies only if it must, and an exported program would keep that choice for other
    # sizes.
    return grid.clone(memory_format=torch.contiguous_format).view(batch * rows * columns, window_size**2, channels)


def join_windows(
    windows: torch.Tensor, batch: int, height: int, width: int, window_size: int, padding: str = "both"
) -> torch.Tensor:
    """Inverse of [`split_into_windows`], padding cut off: (B · windows, window_size², C) -> (B, N, C)."""
    rows, columns, pads = window_grid(height, width, window_size, padding)
    channels = windows.shape[-1]
    grid = windows.view(batch, rows, columns, window_size, window_size, channels).transpose(2, 3)
    grid = grid.clone(memory_format=torch.contiguous_format)
    grid = grid.view(batch, rows * window_size, columns * window_size, channels)
    if torch.compiler.is_exporting() and all(type(side) is int for side in pads):
        # A program for one fixed size. Core ML's converter refuses the negative padding that is used below.
        left, _, top, _ = pads
        grid = grid.narrow(1, top, height).narrow(2, left, width).clone(memory_format=torch.contiguous_format)
    elif is_program_for_all_sizes() or any(pads):
        # In a program for all sizes the result of a slice would have an unknown size; that of `pad` is known.
        grid = nn.functional.pad(grid, (0, 0, *(-side for side in pads)))
    return grid.view(batch, height * width, channels)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: from `(B, heads, T, D)` to `(B, T, heads, D)` and weights `(B, heads, T, T)`."""
    weights = query @ key.transpose(2, 3) * scaling  # (B, heads, T, T)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def distances(length: int, device: torch.device) -> torch.Tensor:
    """How far position q is behind position k, as the number of a row in a table: (q, k) -> q - k + length - 1."""
    positions = torch.arange(length, device=device)
    return positions[:, None] - positions[None, :] + length - 1


class ViTAERelativePositions(nn.Module):
    """What a query adds to its scores for how far above and beside it a key lies: (B, heads, N, D) -> (B, heads, N, N).

    Each distance of rows and each of columns has a vector, whose product with the query counts. On a grid of another
    size than the one they are made for, the tables are resampled.

    Args:
        grid_size: rows and columns that the tables are made for.
        head_dim: D.

    Source: Li et al. 2022, "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection",
    equation 4.
    """

    def __init__(self, grid_size: tuple[int, int], head_dim: int):
        super().__init__()
        self.rel_pos_h: nn.Parameter = nn.Parameter(torch.zeros(2 * grid_size[0] - 1, head_dim))
        self.rel_pos_w: nn.Parameter = nn.Parameter(torch.zeros(2 * grid_size[1] - 1, head_dim))

    @staticmethod
    def resample(table: torch.Tensor, length: int) -> torch.Tensor:
        """A table for an axis of `length` positions: (2L - 1, D) -> (2 · length - 1, D)."""
        if not is_program_for_all_sizes() and table.shape[0] == 2 * length - 1:
            return table
        rows = nn.functional.interpolate(table.float().T[None], size=2 * length - 1, mode="linear")
        return rows[0].T.to(table.dtype)

    @torch.no_grad()
    def resize(self, grid_size: tuple[int, int]) -> None:
        """Resample the tables for a grid of other rows and columns, which become the usual ones."""
        for name, length in zip(("rel_pos_h", "rel_pos_w"), grid_size):
            table = getattr(self, name)
            resampled = self.resample(table, length).clone()
            setattr(self, name, nn.Parameter(resampled, requires_grad=table.requires_grad))

    def forward(self, query: torch.Tensor, height: int, width: int) -> torch.Tensor:
        query = unflatten(query, 2, (height, width))  # (B, heads, H, W, D)
        by_row = self.resample(self.rel_pos_h, height)[distances(height, query.device)]  # (H, H, D)
        by_column = self.resample(self.rel_pos_w, width)[distances(width, query.device)]  # (W, W, D)
        row_scores = query @ by_row.transpose(1, 2).unsqueeze(0).unsqueeze(0)  # (B, heads, H, W, H)
        column_scores = (query.transpose(2, 3) @ by_column.transpose(1, 2)).transpose(2, 3)  # (B, heads, H, W, W)
        return (row_scores.unsqueeze(-1) + column_scores.unsqueeze(-2)).flatten(4).flatten(2, 3)


class ViTAEAttention(nn.Module):
    """Multi-head softmax self-attention: (B, T, Cin) -> (B, T, C). The config names the implementation that runs.

    Args:
        window_size: side of the windows inside of which tokens attend to each other; default: all attend to all. The
            zeros that pad the grid take part, as in the authors' code.
        window_padding: where these zeros are, as [`window_grid`] takes it.
        value_residual: whether the value is added to the output. It serves as the residual where the input cannot,
            because its width differs from the output's.
        rel_pos_size: rows and columns of the grid, or of a window, if tokens see where others lie; default: they do
            not.
        has_dropout: whether the configuration's dropout rates apply.
    """

    def __init__(
        self,
        config: ViTAEFamilyConfig,
        in_size: int,
        hidden_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        window_size: int | None = None,
        window_padding: str = "both",
        value_residual: bool = False,
        rel_pos_size: tuple[int, int] | None = None,
        has_dropout: bool = True,
    ):
        super().__init__()
        self.config = config
        self.head_dim: int = hidden_size // num_heads
        self.scaling: float = self.head_dim**-0.5
        self.attention_dropout: float = config.attention_probs_dropout_prob if has_dropout else 0.0
        self.is_causal = False
        self.window_size, self.window_padding = window_size, window_padding
        self.value_residual = value_residual
        self.q_proj: nn.Linear = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.k_proj: nn.Linear = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.v_proj: nn.Linear = nn.Linear(in_size, hidden_size, bias=qkv_bias)
        self.o_proj: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.dropout: ViTAEDropout = ViTAEDropout(config.hidden_dropout_prob if has_dropout else 0.0)
        self.relative_positions: ViTAERelativePositions | None = None
        if rel_pos_size is not None:
            self.relative_positions = ViTAERelativePositions(rel_pos_size, self.head_dim)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value: (B, T, Cin) -> (B, T, C) each."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return unflatten(states, 2, (-1, self.head_dim)).transpose(1, 2)  # (B, T, C) -> (B, heads, T, D)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention and the output projection, `(B, heads, T, D)` -> `(B, T, C)`, and the weights if they are known.

        Args:
            bias: what is added to the scores before the softmax, `(B, heads, T, T)`.
        """
        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            bias,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.dropout(self.o_proj(output.flatten(2))), weights

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, bias = hidden_states.shape[0], None
        if self.window_size is not None:
            hidden_states = split_into_windows(hidden_states, height, width, self.window_size, self.window_padding)
        query, key, value = map(self.split_heads, self.project(hidden_states))
        if self.relative_positions is not None:
            grid_size = (height, width) if self.window_size is None else (self.window_size, self.window_size)
            bias = self.relative_positions(query * self.scaling, *grid_size)
        output, weights = self.attend(query, key, value, bias, **kwargs)
        if self.value_residual:
            output = output + value.transpose(1, 2).flatten(2)
        if self.window_size is not None:
            output = join_windows(output, batch, height, width, self.window_size, self.window_padding)
        return output, weights


def constant(states: torch.Tensor) -> torch.Tensor:
    """The same values, which pass no gradient on.

    A program that is exported for inference gets them as they are: `detach` would be an operation of it, one that
    Core ML does not have.
    """
    # torch 2.11 calls everything that is compiled exported, and a compiled network may be trained.
    is_exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return states if is_exporting else states.detach()


def random_feature_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, random_projection: torch.Tensor, eps: float = 1e-8
) -> torch.Tensor:
    """Attention with the softmax kernel replaced by its random-feature estimate, in time linear in N.

    With w the rows of `random_projection`, exp(q·k) is the mean over w of exp(w·q - |q|²/2) exp(w·k - |k|²/2): the
    product of two positive features φ. This function computes φ(q)·(φ(k)ᵀ v) / (φ(q)·Σφ(k) + eps).

    To keep the exponentials from overflowing, the largest exponent (of each query, and of all keys of an image) is
    subtracted before `exp`. Numerator and denominator shrink by the same factor, so the quotient only stays the same if
    `eps` shrinks by it too. In the same way |q|²/2 is left out of φ(q) and put into `eps`, and so is M, because sums
    over w are computed and not means.

    All is computed in float32, under autocast too, except the two products with values in bfloat16.

    Args:
        query, key: `(B, N, C)`, not scaled.
        value: `(B, N, C)`.
        random_projection: `(M, C)`.
        eps: what the denominator is increased by.

    Returns:
        `(B, N, C)` in the dtype of `value`.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1 and equation 4.
    """
    with maybe_autocast(device_type=value.device.type, enabled=False):
        query, key, projection = query.float(), key.float(), random_projection.float()
        query_logs, key_logs = query @ projection.T, key @ projection.T  # (B, N, M), w·x
        query_norms, key_norms = (vector_norm(states, dim=-1, keepdim=True).square() / 2 for states in (query, key))
        query_shifts = constant(query_logs).amax(-1, keepdim=True)  # (B, N, 1)
        key_shift = (constant(key_logs).amax(-1, keepdim=True) - constant(key_norms)).amax(1, keepdim=True)  # (B, 1, 1)
        query_features, key_features = query_logs.sub_(query_shifts).exp_(), key_logs.sub_(key_norms + key_shift).exp_()
        # The clamp keeps this a normal float32. Beyond its bounds eps is either negligible or all of the denominator.
        shifted_eps = eps * projection.shape[0] * (query_norms - query_shifts - key_shift).clamp(-60, 80).exp()
        denominator = query_features @ key_features.sum(1).unsqueeze(-1) + shifted_eps
        # The M features of a query are divided, not the C channels of the output: M is half of C. The exponents above
        # need float32; the features are between 0 and 1, where bfloat16 is precise enough.
        dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
        query_features, key_features = (query_features / denominator).to(dtype), key_features.to(dtype)
        output = query_features @ (key_features.transpose(1, 2) @ value.to(dtype))
        return output.to(value.dtype)


class ViTAERandomFeatureAttention(nn.Module):
    """Single-head attention with random features, for reduction cells: (B, N, R·E) -> (B, N, C).

    The value is added to the output as a residual, since the input is wider than the output. `random_projection`
    `(M, C)`, M = C/2, is drawn once and never trained, but it is saved, because the weights around it were trained for
    it. It stays float32, whatever the dtype of the model.
    """

    random_projection: torch.Tensor

    def __init__(self, config: ViTAEConfig, stage_idx: int):
        super().__init__()
        in_size, hidden_size = pyramid_size(config, stage_idx), config.hidden_sizes[stage_idx]
        self.q_proj: nn.Linear = nn.Linear(in_size, hidden_size)
        self.k_proj: nn.Linear = nn.Linear(in_size, hidden_size)
        self.v_proj: nn.Linear = nn.Linear(in_size, hidden_size)
        self.o_proj: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.dropout: ViTAEDropout = ViTAEDropout(config.reduction_dropout_prob)
        projection = torch.empty(hidden_size // 2, hidden_size, dtype=torch.float32)
        self.register_buffer("random_projection", projection)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the module or change its dtype, as `Module.to` does. The random projection only moves."""
        before = self.random_projection
        super()._apply(function, recurse)
        if self.random_projection.dtype != before.dtype:
            self.random_projection = before.to(self.random_projection.device)
        return self

    def forward(self, hidden_states: torch.Tensor, height: int, width: int, **kwargs: Any) -> tuple[torch.Tensor, None]:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attention = random_feature_attention(query, key, value, self.random_projection)
        return value + self.dropout(self.o_proj(attention)), None
