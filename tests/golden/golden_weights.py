"""Deterministic weights for the parity data in this folder.

Every tensor of an original-format ViTAE state dict is drawn from its own NumPy legacy random stream, seeded by the
tensor's name, so two programs that know only names and shapes hold the same weights to the bit. The scales keep
activations of order one through the whole network, random-feature attention included.
"""

import math
import zlib

import numpy as np


def _stream(seed: int, name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0xFFFFFFFF)


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """One tensor of an original-format state dict.

    Args:
        name: its key in the original checkpoint, such as ``layers.2.NC.0.attn.qkv.weight``.
        shape: its shape there.
        seed: which set of weights.

    Returns:
        float32 array of that shape (int64 zero for ``num_batches_tracked``).
    """
    draw = _stream(seed, name)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        value = 0.5 + draw.random_sample(shape)
    elif leaf in ("running_mean", "bias", "q_bias", "v_bias"):
        value = 0.1 * draw.standard_normal(shape)
    elif leaf == "w":  # random features of the linear attention
        value = 0.7 * draw.standard_normal(shape)
    elif leaf in ("pos_embed", "cls_token", "mask_token", "rel_pos_h", "rel_pos_w", "relative_position_bias_table"):
        value = 0.2 * draw.standard_normal(shape)
    elif len(shape) == 1:  # scale of a LayerNorm or BatchNorm
        value = 1 + 0.1 * draw.standard_normal(shape)
    else:
        gain = 0.3 if ".kqv." in name else 1.0
        value = gain / math.sqrt(math.prod(shape[1:])) * draw.standard_normal(shape)
    return np.asarray(value, np.float32)


def images(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """float32 array ``(batch, 3, height, width)``: the normalised pixels that the parity data were computed from."""
    return (
        _stream(seed, f"images{batch}x{height}x{width}").standard_normal((batch, 3, height, width)).astype(np.float32)
    )


def noise(batch: int, patches: int, seed: int = 0) -> np.ndarray:
    """float32 array ``(batch, patches)`` in [0, 1), which decides the mask of a masked autoencoder."""
    return _stream(seed, f"noise{batch}x{patches}").random_sample((batch, patches)).astype(np.float32)
