# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What torch itself traces of a network: programs for other sizes too, in operations that converters know."""

import io

import numpy as np
import pytest
import torch
from helpers import any_size, class_token_config, images, original_weights
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoBackbone, AutoModelForImageClassification

from vitae_hf import ViTAEForPreTraining, convert_original_state_dict


class Outputs(nn.Module):
    """Some outputs of a model, whose arguments that are no tensors are fixed."""

    def __init__(self, model: nn.Module, *names: str, **arguments):
        super().__init__()
        self.model, self.names, self.arguments = model, names, arguments

    def forward(self, *inputs: torch.Tensor) -> tuple:
        outputs = self.model(*inputs, **self.arguments)
        return tuple(outputs[name] for name in self.names)


@torch.no_grad()
def assert_traced_right(module: nn.Module, open_axes: tuple[int, ...], example: tuple, *others: tuple) -> None:
    """What the older tracer of `torch.onnx.export` makes of an example computes the same for other inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    file, names = io.BytesIO(), [f"input{index}" for index in range(len(example))]
    axes = {name: {axis: f"{name}_{axis}" for axis in open_axes} for name in names}
    torch.onnx.export(module.eval(), example, file, dynamo=False, input_names=names, dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for inputs in (example, *others):
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs)})
        for output, expected in zip(outputs, tree_leaves(module(*inputs)), strict=True):
            expected = expected.numpy()
            np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_older_onnx_exporter_leaves_batch_height_and_width_open(tiny_config, attention):
    config = tiny_config()
    model = AutoModelForImageClassification.from_config(config, attn_implementation=attention)
    model.load_state_dict(convert_original_state_dict(original_weights(config), config))
    sizes = ((2, 64, 64), (1, 64, 64), (5, 64, 64), (3, 96, 160), (1, 16, 48))
    assert_traced_right(Outputs(model, "logits", **any_size(model)), (0, 2, 3), *((images(*size),) for size in sizes))


def test_the_older_onnx_exporter_pads_for_backbones_as_torch_does(tiny_config):
    pyramid = {"feature_pyramid_channels": 8} if tiny_config is class_token_config else {}
    backbone = AutoBackbone.from_config(tiny_config(out_indices=[0, 1, 2] if pyramid else [0, 1], **pyramid))
    assert_traced_right(Outputs(backbone, "feature_maps"), (0, 2, 3), (images(2),), (images(3, 70, 90),))


def test_the_older_onnx_exporter_leaves_the_batch_of_a_masked_autoencoder_open():
    model = ViTAEForPreTraining(class_token_config(conv_kernel_size=1))
    examples = ((images(batch), torch.rand(batch, 16)) for batch in (2, 5))
    assert_traced_right(Outputs(model, "loss", "logits"), (0,), *examples)


def test_exported_graphs_have_no_aliases_and_no_negative_padding(tiny_config):
    """Core ML's converter has neither; a `detach` becomes an alias when the program is decomposed."""
    model = AutoModelForImageClassification.from_config(tiny_config()).eval()
    program = torch.export.export(model, (images(1),))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not {torch.ops.aten.alias.default, torch.ops.aten.detach.default} & {node.target for node in nodes}
    paddings = [node.args[1] for node in nodes if node.target is torch.ops.aten.constant_pad_nd.default]
    assert all(min(padding) >= 0 for padding in paddings)
