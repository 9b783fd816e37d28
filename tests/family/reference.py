"""ViTAE written out a second time, plainly: functions of an original-format state dict that share only weights.

It follows the description of the networks line by line, in the dtype of the weights (float64 for a reference), with the
N×N matrix of the random-feature kernel written out, explicit loops, and maps that are copied wherever that is simplest.
"""

import math

import torch
from torch.nn.functional import batch_norm, conv2d, gelu, interpolate, layer_norm, leaky_relu, linear, silu


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


def relative_scores(weights, prefix, query, height, width, scale):
    """What the tables of row and column distances add for each pair of tokens: (N, D) -> (N, N)."""
    tables = []
    for name, length in (("rel_pos_h", height), ("rel_pos_w", width)):
        table = weights[f"{prefix}.{name}"]
        if len(table) != 2 * length - 1:
            table = interpolate(table.T[None], 2 * length - 1, mode="linear")[0].T
        tables.append(table)
    scores = torch.zeros(len(query), len(query), dtype=query.dtype)
    for q in range(len(query)):
        for k in range(len(query)):
            row, column = q // width - k // width, q % width - k % width
            scores[q, k] = scale * query[q] @ (tables[0][row + height - 1] + tables[1][column + width - 1])
    return scores


def bilinear(feature_map, x, y):
    """The value of a map (D, H, W) at a point in pixels, between the four pixels around it; zero outside."""
    value = torch.zeros(len(feature_map), dtype=feature_map.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < feature_map.shape[1] and 0 <= column < feature_map.shape[2]:
                value = value + (1 - abs(y - row)) * (1 - abs(x - column)) * feature_map[:, row, column]
    return value


def sampled_window(weights, prefix, letter, mean, feature_map, head, centre, size, fits):
    """The size² values that a head looks up for the window around `centre` (row, column), whose mean is `mean`."""

    def predicted(name):
        name = f"{prefix}.sampling_{name}{letter}.2"
        return weights[f"{name}.weight"][:, :, 0, 0] @ mean + weights[f"{name}.bias"]

    half = [(side - 1) / 2 for side in feature_map.shape[1:]]  # of the map, in pixels: 1 in its coordinates
    offset, scale = (predicted(name)[2 * head : 2 * head + 2] for name in ("offsets", "scales"))
    angle = predicted("angles")[head]
    values = []
    for index in range(size**2):
        y = (index // size - size // 2) / half[0] * (1 + scale[1])
        x = (index % size - size // 2) / half[1] * (1 + scale[0])
        turned = x * torch.cos(angle) - y * torch.sin(angle), x * torch.sin(angle) + y * torch.cos(angle)
        column = centre[1] + (turned[0] + offset[0] / fits[1]) * half[1]
        row = centre[0] + (turned[1] + offset[1] / fits[0]) * half[0]
        values.append(bilinear(feature_map, column.item(), row.item()))
    return torch.stack(values)


def rotated_window_attention(weights, prefix, tokens, height, width, num_heads, size, letters):
    """Window by window and head by head, for the tokens (N, C) of one image; keys and values by their letters."""
    rows, columns = (-(-side // size) * size for side in (height, width))
    top, left = (rows - height) // 2, (columns - width) // 2
    qkv = linear(tokens, weights[f"{prefix}.qkv.weight"], weights.get(f"{prefix}.qkv.bias"))
    grids = []
    for values in (tokens, *qkv.chunk(3, -1)):
        grid = torch.zeros(values.shape[-1], rows, columns, dtype=tokens.dtype)
        grid[:, top : top + height, left : left + width] = values.T.reshape(-1, height, width)
        grids.append(grid)
    depth, output = tokens.shape[-1] // num_heads, torch.zeros_like(grids[0])
    fits = max(height // size, 1), max(width // size, 1)
    distance = torch.tensor(
        [[[q // size - k // size, q % size - k % size] for k in range(size**2)] for q in range(size**2)]
    )
    index = (distance[..., 0] + size - 1) * (2 * size - 1) + distance[..., 1] + size - 1
    for row in range(0, rows, size):
        for column in range(0, columns, size):
            own = slice(row, row + size), slice(column, column + size)
            mean = leaky_relu(grids[0][:, *own].mean((1, 2)))
            centre = row + (size - 1) / 2, column + (size - 1) / 2
            for head in range(num_heads):
                part = slice(head * depth, (head + 1) * depth)
                query = grids[1][part, *own].reshape(depth, -1).T
                key, value = (
                    sampled_window(weights, prefix, letter, mean, grid[part], head, centre, size, fits)
                    for letter, grid in zip(letters, grids[2:])
                )
                scores = query @ key.T / math.sqrt(depth) + relative_scores(weights, prefix, query, size, size, 1)
                scores = scores + weights[f"{prefix}.relative_position_bias_table"][index][..., head]
                output[part, *own] = (torch.softmax(scores, -1) @ value).T.reshape(depth, size, size)
    output = output[:, top : top + height, left : left + width].flatten(1).T
    return _linear(weights, f"{prefix}.proj", output)


def positioned_attention(weights, prefix, tokens, height, width, num_heads):
    """Attention over all tokens (N, C) of one image, with scores for their distances."""
    qkv = linear(tokens, weights[f"{prefix}.qkv.weight"], weights.get(f"{prefix}.qkv.bias"))
    depth, heads = tokens.shape[-1] // num_heads, []
    for head in range(num_heads):
        query, key, value = (part[:, head * depth : (head + 1) * depth] for part in qkv.chunk(3, -1))
        scale = 1 / math.sqrt(depth)
        scores = scale * query @ key.T + relative_scores(weights, prefix, query, height, width, scale)
        heads.append(torch.softmax(scores, -1) @ value)
    return _linear(weights, f"{prefix}.proj", torch.cat(heads, -1))


def logits_rotated(weights, config, pixel_values):
    """Logits of a plain network with rotated windows, for any valid height and width, in eval mode."""
    height, width = (side // config.total_stride for side in pixel_values.shape[-2:])
    tokens = _tokens(_convolution(weights, "patch_embed.proj", pixel_values, config.total_stride, 0))
    table = torch.nn.functional.pad(weights["pos_embed"], (0, 0, 1, 0))  # `_positions` expects a class token's
    tokens = tokens + _positions(table, height, width)[:, 1:]
    letters = ("_k", "_v") if config.window_type == "rotated_apart" else ("", "")
    for cell in range(config.depths[0]):
        prefix = f"blocks.{cell}"
        normalised, heads = _layer_norm(weights, f"{prefix}.norm1", tokens, 1e-6), config.num_attention_heads[0]
        if cell in config.global_attn_indexes:
            attend, options = positioned_attention, ()
        else:
            attend, options = rotated_window_attention, (config.window_size, letters)
        attention = [attend(weights, f"{prefix}.attn", image, height, width, heads, *options) for image in normalised]
        x = tokens.permute(0, 2, 1).reshape(len(tokens), -1, height, width)
        x = silu(_batch_norm(weights, f"{prefix}.PCM.1", _convolution(weights, f"{prefix}.PCM.0", x)))
        tokens = tokens + torch.stack(attention) + _tokens(_convolution(weights, f"{prefix}.PCM.3", x))
        tokens = tokens + _mlp_v2(weights, f"{prefix}.mlp", _layer_norm(weights, f"{prefix}.norm2", tokens, 1e-6))
    return _linear(weights, "head", _layer_norm(weights, "norm", tokens.mean(1), 1e-6))
