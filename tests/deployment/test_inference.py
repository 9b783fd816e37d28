# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A model prepared for inference computes what it did, and its folder holds an ordinary model."""

import copy
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import any_size, images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTConfig,
    ViTModel,
)

from vitae_hf import config_from_preset, prepare_for_inference
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.deployment import packing
from vitae_hf.deployment.folding import FoldedBatchNorm, fold_batch_norm
from vitae_hf.deployment.packing import PackedAttention, PackedConv2d, PackedLinear
from vitae_hf.embeddings_vitae import sin_cos_positions
from vitae_hf.layers_vitae import ViTAEConvLayer


@torch.no_grad()
def used(model: nn.Module) -> nn.Module:
    """The model with BatchNorms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 2)
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def model(tiny_config):
    return used(AutoModelForImageClassification.from_config(tiny_config()))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images()).logits.float()


def test_the_same_logits_and_an_ordinary_folder(model, tmp_path):
    names, expected = set(model.state_dict()), logits(model)
    assert prepare_for_inference(model) is model
    prepared = logits(model)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-5 * expected.std().item())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(type(norm) is FoldedBatchNorm for norm in norms)
    torch.testing.assert_close(logits(prepare_for_inference(model)), prepared)  # a second time changes nothing
    model.save_pretrained(tmp_path)
    reloaded, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(reloaded.state_dict()) == names and not any(loading.values())
    assert not any(isinstance(module, FoldedBatchNorm) for module in reloaded.modules())
    torch.testing.assert_close(logits(reloaded.eval()), expected, rtol=0, atol=1e-5 * expected.std().item())
    assert all(parameter.requires_grad for name, parameter in reloaded.named_parameters() if "position" not in name)


def test_half_precision_is_close_and_random_features_stay_float32(model):
    expected = logits(model)
    half = logits(prepare_for_inference(model, torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (half - expected).abs().max() < 0.02 * (expected.max() - expected.min())
    projections = [buffer for name, buffer in model.named_buffers() if name.endswith("random_projection")]
    assert all(projection.dtype == torch.float32 for projection in projections)


def packed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (PackedConv2d, PackedLinear))]


def are_packed(model: nn.Module) -> bool:
    """Whether each layer has a packed copy, those before an attention one together."""
    together = [module for module in model.modules() if isinstance(module, PackedAttention)]
    parts = {layer for module in together for layer in (module.q_proj, module.k_proj, module.v_proj)}
    apart = [layer for layer in packed_layers(model) if layer not in parts]
    assert together and apart and all(layer.packed is None for layer in parts)
    return all(module.packed is not None for module in together + apart)


def test_a_mask_token_is_of_the_dtype_too():
    model = AutoModelForMaskedImageModeling.from_config(config_from_preset("vitae-nano"))
    assert prepare_for_inference(model, torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_threads_with_pictures_of_different_sizes_do_not_disturb_each_other():
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config_from_preset("vitae-nano")).eval()
    model = prepare_for_inference(model, torch.bfloat16)
    pictures = [images(1, side, side).bfloat16() for side in (64, 96, 128)]
    expected = [model(picture).logits for picture in pictures]

    def run(index: int) -> bool:
        with torch.inference_mode():
            return torch.equal(model(pictures[index]).logits, expected[index])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, [0, 1, 2] * 20))


def test_layers_are_packed_again_when_their_weights_change(model):
    expected = logits(prepare_for_inference(model))
    copied = copy.deepcopy(model)  # of packed layers
    assert are_packed(model)
    weights = {name: 1.1 * weight for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    changed = logits(model)
    assert (changed - expected).abs().max() > 0.01 * expected.std()
    torch.testing.assert_close(logits(copied), expected)
    copied.load_state_dict(weights)
    torch.testing.assert_close(logits(copied), changed)
    torch.testing.assert_close(logits(model.double()), changed, rtol=0, atol=1e-4 * changed.std().item())  # unpacked
    wide = images(1, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            model.float()(wide, **any_size(model)).logits, copied(wide, **any_size(model)).logits
        )


def test_what_is_trained_in_evaluation_mode_is_packed_again(model):
    before = logits(prepare_for_inference(model))
    model.requires_grad_(True)
    model(images()).logits.sum().backward()
    with torch.no_grad():
        for layer in packed_layers(model):
            layer.weight -= 0.1 * layer.weight.grad.sign() * layer.weight.std()
    after = logits(model)
    assert (after - before).abs().max() > 0.01 * before.std()
    torch.testing.assert_close(logits(copy.deepcopy(model)), after)


def test_weights_that_are_edited_or_replaced_are_packed_again(model):
    prepared = copy.deepcopy(prepare_for_inference(model))

    def replace_twice(weight: torch.Tensor, factor: float) -> None:
        weight.data = weight * 2 * factor
        weight.data = weight / 2  # perhaps where the first one was

    for change in (torch.Tensor.mul_, replace_twice):
        logits(prepared)
        with torch.no_grad():
            for layer in packed_layers(prepared):
                change(layer.weight, 1.1)
        torch.testing.assert_close(logits(prepared), logits(copy.deepcopy(prepared)))
    assert (logits(prepared) - logits(model)).abs().max() > 0.01 * logits(model).std()


def test_a_projection_that_is_watched_or_replaced_counts(model):
    before = logits(prepare_for_inference(model))
    attention = next(module for module in model.modules() if isinstance(module, PackedAttention))
    hook = attention.k_proj.register_forward_hook(lambda layer, inputs, output: -output)
    assert not torch.equal(logits(model), before)
    hook.remove()
    torch.testing.assert_close(logits(model), before)
    attention.k_proj.bias = None  # which the softmax does not see
    torch.testing.assert_close(logits(model), before)
    attention.v_proj = nn.Linear(*attention.v_proj.weight.shape[::-1]).requires_grad_(False)
    assert not torch.equal(logits(model), before)


def test_adapters_refuse_a_prepared_model_since_their_place_is_before_its_activations(model):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="PackedLinear.* is not supported"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"]), prepare_for_inference(model))


def test_kernels_of_a_prepared_model_can_be_expanded():
    model = used(AutoModel.from_config(config_from_preset("vitae-nano-mae", conv_kernel_size=1)))
    narrow = prepare_for_inference(model)(images()).last_hidden_state
    model.expand_conv_kernels()
    torch.testing.assert_close(model(images()).last_hidden_state, narrow)
    type(model)(model.config).load_state_dict(model.state_dict())  # of 3×3 kernels, or it raises


def test_gradients_and_autocast_are_those_of_the_ordinary_layers(model):
    pixel_values = images().requires_grad_()
    (expected,) = torch.autograd.grad(model(pixel_values).logits.sum(), pixel_values)
    prepare_for_inference(model)
    (gradient,) = torch.autograd.grad(model(pixel_values).logits.sum(), pixel_values)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model)
        linear = next(layer for layer in packed_layers(model) if isinstance(layer, PackedLinear))
        assert linear(torch.zeros(1, linear.weight.shape[1])).dtype == torch.bfloat16
    assert (half - logits(model)).abs().max() < 0.05 * half.std()


@pytest.mark.parametrize("channels", [(8, 8), (8, 24), (24, 8), (64, 64)])
def test_merged_groups_compute_the_same(channels, monkeypatch):
    """As on a processor with tiles for bfloat16, wherever this runs."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    conv = nn.Conv2d(*channels, 3, stride=2, padding=1, groups=4).to(torch.bfloat16).requires_grad_(False)
    packed = PackedConv2d(conv, "swish")
    feature_map = torch.randn(2, channels[0], 9, 12, dtype=torch.bfloat16)
    expected = nn.functional.silu(conv.float()(feature_map.float()))
    assert (packed.to(torch.bfloat16)(feature_map).float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert packed.packed.geometry[-1] == (4 if channels == (64, 64) else 1)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("size", [(56, 56), (37, 50)])
@pytest.mark.parametrize(
    "kernel_size, stride, dilation", [(7, 4, 2), (7, 4, 4), (3, 2, 2), (3, 2, 4), (3, 2, 3), (3, 3, 6)]
)
def test_a_convolution_over_every_so_many_rows_computes_the_same(size, kernel_size, stride, dilation, monkeypatch):
    monkeypatch.setattr(packing, "has_amx", lambda: True)
    padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
    conv = nn.Conv2d(4, 8, kernel_size, stride, padding, dilation).bfloat16().requires_grad_(False)
    packed = PackedConv2d(conv, "gelu")
    feature_map = torch.randn(2, 4, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    expected = nn.functional.gelu(conv(feature_map).float())
    torch.testing.assert_close(packed(feature_map).float(), expected, rtol=0.02, atol=0.02)
    assert packed.packed.read[-1].step == math.gcd(stride, dilation)


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    model = used(AutoModelForImageClassification.from_config(config_from_preset("vitaev2-nano")))
    expected = logits(model)
    compiled = logits(prepare_for_inference(model, compile=True))
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-4 * expected.std().item())


def test_a_segmenter_keeps_what_is_not_of_this_family():
    model = used(new_segmenter(dense_config(config_from_preset("vitae-nano")), {0: "a", 1: "b"}, 8))
    head = copy.deepcopy(model.decode_head)
    expected = logits(model)
    torch.testing.assert_close(
        logits(prepare_for_inference(model)), expected, rtol=0, atol=1e-5 * expected.std().item()
    )
    assert all(torch.equal(*pair) for pair in zip(head.state_dict().values(), model.decode_head.state_dict().values()))


def test_training_normalises_again(model):
    prepare_for_inference(model).train()
    before = [norm.running_mean.clone() for norm in model.modules() if isinstance(norm, FoldedBatchNorm)]
    model(images())
    after = [norm.running_mean for norm in model.modules() if isinstance(norm, FoldedBatchNorm)]
    assert not any(torch.equal(*pair) for pair in zip(before, after))


class HalvedWeight(torch.Tensor):
    """As quantised weights are: the layer computes with other numbers than are in its memory."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (nn.functional.linear, nn.functional.conv2d):
            inputs, weight, *others = args
            return function(inputs, 2 * weight.as_subclass(torch.Tensor), *others)
        return super().__torch_function__(function, types, args, kwargs or {})


def with_weights_of_another_class(model: nn.Module) -> None:
    for layer in original_layers(model):
        layer.weight = nn.Parameter((layer.weight.detach() / 2).as_subclass(HalvedWeight), requires_grad=False)


def with_a_parametrization(model: nn.Module) -> None:
    for layer in original_layers(model):
        nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data *= 1.5


def with_hooks(model: nn.Module) -> None:
    for layer in original_layers(model):
        layer.register_forward_hook(lambda layer, inputs, output: 0.9 * output)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GELU, nn.SiLU)):
            module.register_forward_pre_hook(lambda module, inputs: (1.1 * inputs[0],))


def with_forwards_of_their_own(model: nn.Module) -> None:
    for layer in original_layers(model):
        layer.forward = lambda inputs, forward=layer.forward: 0.9 * forward(inputs)


def with_adapters(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    names = ["q_proj", "v_proj", "fc1", "conv", "convs.0"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=24, target_modules=names, init_lora_weights=False), model)


def original_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]


CHANGES = [
    with_weights_of_another_class,
    with_a_parametrization,
    with_hooks,
    with_forwards_of_their_own,
    with_adapters,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_others_changed_stay_as_they_are(model, change):
    change(model)
    expected = logits(model.eval())
    torch.testing.assert_close(
        logits(prepare_for_inference(model)), expected, rtol=0, atol=1e-5 * expected.std().item()
    )


def test_a_packed_layer_that_is_quantised_computes_with_its_new_weight():
    packed, inputs = PackedLinear(nn.Linear(8, 8).requires_grad_(False), "none"), torch.randn(2, 8)
    expected = packed(inputs)
    packed.weight = nn.Parameter((packed.weight / 4).as_subclass(HalvedWeight), requires_grad=False)
    torch.testing.assert_close(packed(inputs) - packed.bias, (expected - packed.bias) / 2)


class WithoutFloat64(TorchDispatchMode):
    """As on a device of Apple's: no tensor of float64 there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu" and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert to float64 on this device")
        return result


FLOAT64 = {"fold": lambda: fold_batch_norm(ViTAEConvLayer(4, 4)), "positions": lambda: sin_cos_positions((2, 3), 8)}


@pytest.mark.parametrize("make", FLOAT64.values(), ids=FLOAT64)
def test_no_device_but_the_cpu_needs_float64(make):
    with FakeTensorMode(), torch.device("cuda"), WithoutFloat64():
        make()


def test_what_cannot_be_prepared_is_told():
    other = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="expected a ViTAE or ViTAEv2, .*; got ViTModel"):
        prepare_for_inference(other)
    with torch.device("meta"):
        offloaded = AutoModel.from_config(config_from_preset("vitae-nano"))
    with pytest.raises(ValueError, match="offloaded"):
        prepare_for_inference(offloaded)
