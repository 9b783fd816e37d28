# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Runs a Core ML program by torch, where there is no Core ML: each operation as Apple's reference describes it."""

from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load
from torch.nn import functional as F


def conv(x, weight, strides, dilations, groups, pad, pad_type, bias=None):
    top, bottom, left, right = {"custom": pad, "valid": (0, 0, 0, 0)}[pad_type]
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, strides, 0, dilations, groups)


def layer_norm(x, axes, gamma, beta, epsilon):
    return F.layer_norm(x, [x.shape[axis] for axis in axes], gamma, beta, epsilon)


def matmul(x, y, transpose_x, transpose_y):
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def pad(x, pad, mode, constant_val):
    assert mode == "constant"
    sides = [side for pair in reversed(list(zip(pad[::2], pad[1::2]))) for side in pair]
    return F.pad(x, sides, value=constant_val)


def slice_by_index(x, begin, end, begin_mask=(False,) * 9, end_mask=(False,) * 9):
    bounds = zip(begin, end, begin_mask, end_mask)
    return x[tuple(slice(None if first else start, None if last else stop) for start, stop, first, last in bounds)]


def gelu(x, mode):
    assert mode == "EXACT"
    return F.gelu(x)


OPERATIONS = {
    "add": lambda x, y: x + y,
    "clip": lambda x, alpha, beta: x.clip(alpha, beta),
    "concat": lambda values, axis, interleave: torch.cat(values, axis),
    "conv": conv,
    "exp": lambda x: x.exp(),
    "expand_dims": lambda x, axes: x.unsqueeze(*axes),
    "gelu": gelu,
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "pad": pad,
    "real_div": lambda x, y: x / y,
    "reduce_l2_norm": lambda x, axes, keep_dims: x.square().sum(axes, keep_dims).sqrt(),
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes, keep_dims),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes, keep_dims),
    "reshape": lambda x, shape: x.reshape(shape),
    "silu": lambda x: F.silu(x),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis: x.softmax(axis),
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute(perm),
}


def value_of(variable: Any, known: dict[str, torch.Tensor]) -> Any:
    """A tensor that was computed or is a weight; or a setting, as Python writes it."""
    if isinstance(variable, (list, tuple)):
        return [value_of(part, known) for part in variable]
    if variable.name in known:
        return known[variable.name]
    value = variable.val
    is_weights = isinstance(value, np.ndarray) and value.dtype == np.float32
    return torch.from_numpy(value) if is_weights else value.tolist() if hasattr(value, "tolist") else value


def run(package: Path, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of a saved program, by name."""
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    specification = model.get_spec()
    function = load(specification, specification.specificationVersion, model.weights_dir).functions["main"]
    known = {"pixel_values": pixel_values}
    for operation in function.operations:
        if operation.op_type == "const":
            continue
        inputs = {
            name: value_of(variable, known) for name, variable in operation.inputs.items() if variable is not None
        }
        known[operation.outputs[0].name] = OPERATIONS[operation.op_type](**inputs)
    return {output.name: known[output.name] for output in function.outputs}
