"""ViTAE written out a second time, plainly: functions of an original-format state dict that share only weights.

It follows the description of the networks line by line, in the dtype of the weights (float64 for a reference), with the
N×N matrix of the random-feature kernel written out, explicit loops, and maps that are copied wherever that is simplest.
"""

import math

import torch
from torch.nn.functional import batch_norm, conv2d, gelu, interpolate, layer_norm, linear, silu


def _convolution(weights, name, x, stride=1, padding=1, dilation=1):
    weight = weights[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return conv2d(x, weight, weights[f"{name}.bias"], stride, padding, dilation, groups)


def _batch_norm(weights, name, x):
    statistics = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"], False, 0.1, 1e-5)


def _layer_norm(weights, name, x, eps):
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _linear(weights, name, x):
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _tokens(x):
    return x.reshape(*x.shape[:2], -1).permute(0, 2, 1)


def random_feature_attention(query, key, value, projection):
    """For each pair of tokens the kernel value, then a weighted mean of the values."""

    def features(x):
        return torch.exp(x @ projection.T - (x**2).sum(-1, keepdim=True) / 2) / math.sqrt(projection.shape[0])

    kernel = torch.einsum("bim,bjm->bij", features(query), features(key))
    return kernel @ value / (kernel.sum(-1, keepdim=True) + 1e-8)


def reduction_cell(weights, prefix, x, kernel_size, stride, dilations, kind):
    maps = []
    for index, dilation in enumerate(dilations):
        padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
        maps.append(gelu(_convolution(weights, f"{prefix}.PRM.convs.{index}.0", x, stride, padding, dilation)))
    tokens = _tokens(torch.cat(maps, 1))
    if kind == "pyramid":
        return tokens
    key, query, value = _linear(
        weights, f"{prefix}.attn.kqv", _layer_norm(weights, f"{prefix}.attn.norm1", tokens, 1e-5)
    ).chunk(3, -1)
    attention = random_feature_attention(query, key, value, weights[f"{prefix}.attn.w"])
    tokens = value + _linear(weights, f"{prefix}.attn.proj", attention)
    branch = silu(_convolution(weights, f"{prefix}.PCM.0", x, 2))
    branch = silu(
        _batch_norm(weights, f"{prefix}.PCM.3", _convolution(weights, f"{prefix}.PCM.2", branch, stride // 2))
    )
    tokens = tokens + _tokens(silu(_convolution(weights, f"{prefix}.PCM.5", branch)))
    hidden = gelu(_linear(weights, f"{prefix}.attn.mlp.0", _layer_norm(weights, f"{prefix}.attn.norm2", tokens, 1e-5)))
    return tokens + _linear(weights, f"{prefix}.attn.mlp.2", hidden)


def normal_cell(weights, prefix, tokens, height, width, num_heads, num_class_tokens, long_branch):
    batch, length, channels = tokens.shape
    qkv = _linear(weights, f"{prefix}.attn.qkv", _layer_norm(weights, f"{prefix}.norm1", tokens, 1e-6))
    query, key, value = qkv.reshape(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(channels // num_heads), -1)
    attention = _linear(weights, f"{prefix}.attn.proj", (scores @ value).permute(0, 2, 1, 3).reshape(tokens.shape))
    x = tokens[:, num_class_tokens:].permute(0, 2, 1).reshape(batch, channels, height, width)
    x = silu(_batch_norm(weights, f"{prefix}.PCM.1", _convolution(weights, f"{prefix}.PCM.0", x)))
    x = _convolution(weights, f"{prefix}.PCM.3", x)
    if long_branch:
        x = silu(_convolution(weights, f"{prefix}.PCM.6", silu(_batch_norm(weights, f"{prefix}.PCM.4", x))))
    branch = torch.cat([torch.zeros_like(tokens[:, :num_class_tokens]), _tokens(x)], 1)
    tokens = tokens + attention + branch
    hidden = gelu(_linear(weights, f"{prefix}.mlp.fc1", _layer_norm(weights, f"{prefix}.norm2", tokens, 1e-6)))
    return tokens + _linear(weights, f"{prefix}.mlp.fc2", hidden)


def _attend(query, key, value, num_heads):
    """Softmax attention of tokens (T, C), one head after the other."""
    width = query.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        q, k, v = (x[:, head * width : (head + 1) * width] for x in (query, key, value))
        heads.append(torch.softmax(q @ k.T / math.sqrt(width), -1) @ v)
    return torch.cat(heads, -1)


def attention_v2(weights, prefix, tokens, height, width, num_heads, window, padding, value_skip):
    """ViTAEv2's attention, window by window over a zero-padded copy of the grid, or once over all of it."""
    size = window or max(height, width)
    rows, columns = (-(-side // size) * size for side in (height, width)) if window else (height, width)
    top, left = ((rows - height) // 2, (columns - width) // 2) if padding == "both" else (0, 0)
    output = []
    for image in tokens:
        grid = torch.zeros(rows, columns, image.shape[-1], dtype=image.dtype)
        grid[top : top + height, left : left + width] = image.reshape(height, width, -1)
        result = None
        for row in range(0, rows, size if window else rows):
            for column in range(0, columns, size if window else columns):
                part = grid[row : row + size, column : column + size]
                flat = part.reshape(-1, part.shape[-1])
                qkv = linear(flat, weights[f"{prefix}.qkv.weight"], weights.get(f"{prefix}.qkv.bias"))
                query, key, value = qkv.chunk(3, -1)
                attended = _linear(weights, f"{prefix}.proj", _attend(query, key, value, num_heads))
                attended = attended + value if value_skip else attended
                if result is None:
                    result = torch.zeros(rows, columns, attended.shape[-1], dtype=image.dtype)
                result[row : row + size, column : column + size] = attended.reshape(*part.shape[:2], -1)
        output.append(result[top : top + height, left : left + width].reshape(height * width, -1))
    return torch.stack(output)


def _branch_v2(weights, prefix, x, strides):
    x = silu(_batch_norm(weights, f"{prefix}.1", _convolution(weights, f"{prefix}.0", x, strides[0])))
    x = silu(_batch_norm(weights, f"{prefix}.4", _convolution(weights, f"{prefix}.3", x, strides[1])))
    return _tokens(_convolution(weights, f"{prefix}.6", x))


def _mlp_v2(weights, prefix, tokens):
    return _linear(weights, f"{prefix}.fc2", gelu(_linear(weights, f"{prefix}.fc1", tokens)))


def logits_v2(weights, config, pixel_values):
    """Logits of the ViTAEv2 network that `config` describes, for any valid height and width, in eval mode."""
    x = pixel_values
    for stage in range(len(config.depths)):
        kernel_size, stride, cell = config.reduction_kernel_sizes[stage], config.strides[stage], f"layers.{stage}.RC"
        windows = config.window_sizes[stage], config.window_padding
        height, width = x.shape[2] // stride, x.shape[3] // stride
        maps = []
        for index, dilation in enumerate(config.reduction_dilations[stage]):
            padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
            maps.append(gelu(_convolution(weights, f"{cell}.PRM.convs.{index}.0", x, stride, padding, dilation)))
        tokens = _layer_norm(weights, f"{cell}.attn.norm1", _tokens(torch.cat(maps, 1)), 1e-5)
        heads = config.reduction_num_attention_heads[stage]
        tokens = attention_v2(weights, f"{cell}.attn.attn", tokens, height, width, heads, *windows, not windows[0])
        tokens = tokens + _branch_v2(weights, f"{cell}.PCM", x, (2, stride // 2))
        normalised = _layer_norm(weights, f"{cell}.attn.norm2", tokens, 1e-5)
        tokens = tokens + _mlp_v2(weights, f"{cell}.attn.mlp", normalised)
        for index in range(config.depths[stage]):
            cell, heads = f"layers.{stage}.NC.{index}", config.num_attention_heads[stage]
            normalised = _layer_norm(weights, f"{cell}.norm1", tokens, 1e-6)
            attended = attention_v2(weights, f"{cell}.attn", normalised, height, width, heads, *windows, False)
            grid = tokens.permute(0, 2, 1).reshape(len(x), -1, height, width)
            tokens = tokens + attended + _branch_v2(weights, f"{cell}.PCM", grid, (1, 1))
            tokens = tokens + _mlp_v2(weights, f"{cell}.mlp", _layer_norm(weights, f"{cell}.norm2", tokens, 1e-6))
        x = tokens.permute(0, 2, 1).reshape(len(x), -1, height, width)
    return _linear(weights, "head", x.mean((2, 3)))


def logits(weights, config, pixel_values):
    """Logits of the ViTAE network that `config` describes, for any valid height and width, in eval mode."""
    x, (height, width) = pixel_values, pixel_values.shape[-2:]
    plain = config.reduction_types == ("patch",)
    for stage in range(len(config.depths)):
        stride, kernel_size = config.strides[stage], config.reduction_kernel_sizes[stage]
        height, width = height // stride, width // stride
        if plain:
            tokens = _tokens(_convolution(weights, "layers.0.RC.PRM.proj", x, stride, 0))
            tokens = torch.cat([weights["layers.0.RC.cls_token"].expand(len(x), -1, -1), tokens], 1)
            tokens = tokens + _positions(weights["layers.0.RC.pos_embed"], height, width)
        else:
            kind, dilations = config.reduction_types[stage], config.reduction_dilations[stage]
            tokens = reduction_cell(weights, f"layers.{stage}.RC", x, kernel_size, stride, dilations, kind)
        for cell in range(config.depths[stage]):
            name = f"layers.{2 if plain else stage}.NC.{cell}"
            heads = config.num_attention_heads[stage]
            tokens = normal_cell(weights, name, tokens, height, width, heads, int(plain), config.conv_branch_depth == 3)
        x = tokens[:, int(plain) :].permute(0, 2, 1).reshape(len(x), -1, height, width)
    features = x.mean((2, 3))
    if plain:
        features = _layer_norm(weights, "fc_norm", features, 1e-6)
    return _linear(weights, "head", features)


def _positions(table, height, width):
    side = math.isqrt(table.shape[1] - 1)
    if (side, side) == (height, width):
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return torch.cat(
        [table[:, :1], _tokens(interpolate(grid, (height, width), mode="bicubic", align_corners=False))], 1
    )
