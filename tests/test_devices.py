"""Without a GPU: no tensor is made on another device than the model's, and nothing asks for a number on the way.

On fake CUDA tensors, operations check devices and types, compute nothing, and refuse to give a number to Python
(`.item()`) or a shape that depends on numbers. Meta tensors do the same for the backward pass, for which autograd asks
for a real GPU. `training/test_steps.py` has the trainers' whole steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import CONFIGS, IMAGE, any_size, class_token_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoBackbone, AutoModelForImageClassification

from vitae_hf import (
    PRESETS,
    ViTAEForMaskedImageModeling,
    ViTAEForPreTraining,
    ViTAEImageProcessor,
    config_from_preset,
    prepare_for_inference,
)
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.deployment import folding, packing
from vitae_hf.evaluation.explanation import explain
from vitae_hf.layers_vitae import ViTAEBatchNorm2d, ViTAEConvLayer


def classifier(config) -> nn.Module:
    return AutoModelForImageClassification.from_config(config)


def backbone(config) -> nn.Module:
    return AutoBackbone.from_config(dense_config(config))


def segmenter(config) -> nn.Module:
    return new_segmenter(dense_config(config), dict(enumerate("abcde")), head_channels=8)


NETWORKS = {
    f"{build.__name__}-{kind}": (build, make_config)
    for build in (classifier, backbone, segmenter)
    for kind, make_config in CONFIGS.items()
}
NETWORKS["autoencoder"] = (ViTAEForPreTraining, partial(class_token_config, conv_kernel_size=1))
NETWORKS["masked"] = (ViTAEForMaskedImageModeling, CONFIGS["pyramid"])


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    """Every class on every kind of network, on the meta device, in training mode."""
    build, make_config = NETWORKS[request.param]
    with torch.device("meta"):
        return build(make_config(drop_path_rate=0.1)).train()


def outputs_of(model: nn.Module, height: int = 64, width: int = 64):
    """What a model makes of a batch on its device, with its loss if it has one."""
    inputs = {"pixel_values": torch.empty(2, 3, height, width, dtype=model.dtype, device=model.device)}
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        inputs |= {"labels": torch.zeros(2, dtype=torch.long, device=model.device), **any_size(model)}
    elif hasattr(model, "mask_token"):
        patches = height * width // model.config.patch_size**2
        inputs["bool_masked_pos"] = torch.ones(2, patches, dtype=torch.bool, device=model.device)
    elif hasattr(model, "decode_head"):
        inputs["labels"] = torch.zeros(2, height, width, dtype=torch.long, device=model.device)
    return model(**inputs)


def tensors(outputs) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tuple(outputs.values())) if isinstance(leaf, torch.Tensor)]


def assert_all_get_gradients(model: nn.Module, outputs) -> None:
    loss = outputs.loss if "loss" in outputs else sum(found.square().mean() for found in outputs.feature_maps)
    loss.backward()
    assert all(weight.grad.is_meta for weight in model.parameters() if weight.requires_grad)


@contextmanager
def on_fake_cuda(model: nn.Module) -> Iterator[nn.Module]:
    """In the block there is a CUDA device whose tensors hold nothing, and the model, made of meta tensors, is on it."""
    # Without cudnn, whose `grid_sample` has no implementation for fake tensors.
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="cuda")))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        yield model


@pytest.fixture(autouse=True)
def bfloat16_on_fake_cuda(monkeypatch):
    """Lets autocast believe in that device."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training with autocast"])
def test_forward_and_loss_stay_on_the_gpu(network, training):
    is_autoencoder = isinstance(network, ViTAEForPreTraining)
    with on_fake_cuda(network.train(training)) as model, torch.autocast("cuda", torch.bfloat16, enabled=training):
        outputs = outputs_of(model) if is_autoencoder else outputs_of(model, 96, 64)
    assert {tensor.device.type for tensor in tensors(outputs)} == {"cuda"}
    if "loss" in outputs:
        assert outputs.loss.dtype == torch.float32
    if isinstance(getattr(network, "classifier", None), nn.Linear):
        assert outputs.logits.dtype == (torch.bfloat16 if training else torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_an_update_gives_python_no_number(network, checkpointing):
    if checkpointing:
        getattr(network, "backbone", network).gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
    assert_all_get_gradients(network, outputs_of(network))
    optimizer.step()


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_makes_a_tensor_elsewhere(preset):
    config = config_from_preset(preset)
    with torch.device("meta"):
        model = classifier(config).train()
    assert_all_get_gradients(model, outputs_of(model, config.image_size, config.image_size))


def test_a_prepared_model_stays_on_the_gpu(network, monkeypatch):
    if isinstance(network, ViTAEForPreTraining):
        pytest.skip("is trained only")
    for module in (folding, packing):  # parameters that are fake are of a type of their own, like quantised ones
        monkeypatch.setattr(module, "is_plain", lambda layer: type(layer) in (nn.Linear, nn.Conv2d))
    with on_fake_cuda(network.to(torch.bfloat16)) as model:
        outputs = outputs_of(prepare_for_inference(model))
    assert {tensor.device.type for tensor in [*model.state_dict().values(), *tensors(outputs)]} == {"cuda"}
    layers = [module for module in model.modules() if isinstance(module, ViTAEConvLayer)]
    assert layers and not any(isinstance(layer.norm, ViTAEBatchNorm2d) for layer in layers)


def test_an_explanation_leaves_the_device_by_copies_alone(tiny_config, monkeypatch):
    """In the place of numbers, which meta tensors do not have, `.cpu()` gives zeros."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    with torch.device("meta"):
        model = classifier(tiny_config())
    explanation = explain(model, ViTAEImageProcessor(size=64), IMAGE)
    assert explanation.grad_cam.shape == (64, 64) and len(explanation.labels) == 5
    assert len(explanation.attention_share) == len(explanation.cells) > 0
    assert bool(explanation.rollout) == (getattr(model.config, "window_type", "plain") == "plain")
    assert all(parameter.is_meta for parameter in model.parameters())
