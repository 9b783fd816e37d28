"""The networks compute what the authors' networks compute: golden data, and a plain reference where that ends."""

import copy
import inspect

import numpy as np
import pytest
import reference
import torch
from helpers import GOLDEN, images, original_weights, windowed_config
from measure_parity import golden_state_dict, measure
from torch import nn
from transformers import AutoModelForImageClassification

from vitae_hf import config_from_preset, convert_original_state_dict, detect_preset, prepare_for_inference
from vitae_hf.attention_vitae import random_feature_attention
from vitae_hf.configuration_vitae import ViTAEFamilyConfig
from vitae_hf.hub.original_names import original_layout


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "drop_path_rate": 0.0}


def assert_close(actual: torch.Tensor, expected: np.ndarray, what: str, tolerance: float = 2e-5):
    error = np.abs(actual.detach().numpy() - expected).max() / expected.std()
    assert error < tolerance, f"{what} differs by {error:.2g} of its standard deviation"


@pytest.fixture(scope="module", params=["vitae-t", "vitae-6m", "vitae-s", "vitae-b", "vitaev2-s"])
def network(request):
    """(golden arrays, model with the golden weights, what each stage gave in eval mode)."""
    golden = np.load(GOLDEN / f"{request.param}_224_seed0.npz")
    state_dict = golden_state_dict(request.param)
    assert detect_preset(state_dict) == request.param
    more = {} if request.param.startswith("vitaev2") else {"reduction_dropout_prob": 0.0}
    model = AutoModelForImageClassification.from_config(config_from_preset(request.param, **NO_DROPOUT, **more))
    model.load_state_dict(convert_original_state_dict(state_dict))
    return golden, model


def test_logits_features_and_stages_equal_the_authors(network):
    golden, model = network
    with torch.no_grad():
        outputs = model.eval()(images(2, 224, 224), output_hidden_states=True)
        features = model.base_model(images(2, 224, 224)).pooler_output
    assert_close(outputs.logits, golden["logits"], "logits")
    assert_close(features, golden["features"], "features")
    if model.config.has_class_token:  # three stages there, of which the first two are the embedding
        stages = [outputs.hidden_states[0], outputs.hidden_states[0], outputs.hidden_states[1]]
    else:
        stages = [feature_map.flatten(2).transpose(1, 2) for feature_map in outputs.hidden_states[1:]]
    for index, tokens in enumerate(stages, start=1):
        assert tokens.shape == tuple(golden[f"stage{index}_shape"])
        sample = np.random.RandomState(1).choice(tokens.numel(), 4096, replace=False)
        assert_close(tokens.flatten()[np.sort(sample)], golden[f"stage{index}_sample"], f"stage {index}")


def test_prepared_networks_equal_the_authors_too(network):
    golden, model = network
    expected = golden["logits"]
    with torch.no_grad():
        prepared = prepare_for_inference(copy.deepcopy(model))
        assert_close(prepared(images(2, 224, 224)).logits, expected, "prepared logits")
        half = prepare_for_inference(prepared, torch.bfloat16)(images(2, 224, 224)).logits.float().numpy()
    assert np.abs(half - expected).max() < 0.02 * np.ptp(expected)


def test_vitaev2_equals_the_authors_where_windows_need_padding():
    golden = np.load(GOLDEN / "vitaev2-s_256_seed0.npz")
    model = AutoModelForImageClassification.from_config(config_from_preset("vitaev2-s")).eval()
    model.load_state_dict(convert_original_state_dict(golden_state_dict("vitaev2-s")))
    with torch.no_grad():
        outputs = model(images(len(golden["logits"]), 256, 256), output_hidden_states=True)
    assert_close(outputs.logits, golden["logits"], "logits")
    for index, feature_map in enumerate(outputs.hidden_states[1:], start=1):
        tokens = feature_map.flatten(2).transpose(1, 2)
        sample = np.random.RandomState(1).choice(tokens.numel(), 4096, replace=False)
        assert_close(tokens.flatten()[np.sort(sample)], golden[f"stage{index}_sample"], f"stage {index}")


def test_training_pass_equals_the_authors(network):
    golden, model = network
    state = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model.train()(images(2, 224, 224), labels=torch.tensor([0, 7]))
    outputs.loss.backward()
    assert_close(outputs.logits, golden["train_logits"], "logits")
    assert outputs.loss.item() == pytest.approx(golden["train_loss"].item(), rel=2e-5)
    layout = original_layout(model.config)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    statistics = dict(model.named_buffers())
    for kind, values in (("grad", gradients), ("bn", statistics)):
        for name, expected in zip(golden[f"{kind}_names"], golden[f"{kind}_norms"]):
            norm = torch.stack([values[part].double().norm() for part in layout[name]]).norm().item()
            assert norm == pytest.approx(expected, rel=1e-3, abs=1e-5), f"{kind} {name}"
    assert len(golden["grad_names"]) == len(
        [name for name in layout if any(part in gradients for part in layout[name])]
    )
    model.zero_grad()
    model.load_state_dict(state)


def assert_equals_reference(config: ViTAEFamilyConfig, height: int, width: int):
    weights = original_weights(config)
    model = AutoModelForImageClassification.from_config(config).eval()
    model.load_state_dict(convert_original_state_dict(weights, config))
    pixel_values = images(3, height, width)
    with torch.no_grad():
        logits = model(pixel_values, interpolate_pos_encoding=True).logits
    plain_logits = reference.logits_v2 if config.model_type == "vitaev2" else reference.logits
    plain_logits = reference.logits_rotated if config.adds_to_scores else plain_logits
    weights = {name: value.double() for name, value in weights.items()}
    expected = plain_logits(weights, config, pixel_values.double())
    assert_close(logits, expected.numpy(), "logits")


@pytest.mark.parametrize("height, width", [(64, 64), (32, 80)])
def test_any_size_equals_a_plain_float64_reference(tiny_config, height, width):
    assert_equals_reference(tiny_config(), height, width)


@pytest.mark.parametrize("height, width", [(64, 64), (32, 80)])
def test_windows_padded_at_the_end_equal_the_reference_too(height, width):
    assert_equals_reference(windowed_config(window_padding="end"), height, width)


def test_random_features_equal_the_kernel_matrix():
    query, key, value = torch.randn(3, 2, 50, 16) * 0.5
    projection = torch.randn(8, 16)
    expected = reference.random_feature_attention(*(x.double() for x in (query, key, value, projection)))
    assert_close(random_feature_attention(query, key, value, projection), expected.numpy(), "attention", tolerance=1e-5)


def test_the_epsilon_of_random_features_keeps_its_place_under_the_shift():
    """With kernel values around 1e-8 the epsilon decides the result, which no golden data show."""
    query, key, value = torch.randn(3, 2, 50, 16) * 1.2
    projection = torch.randn(8, 16) * 0.1
    expected = reference.random_feature_attention(*(x.double() for x in (query, key, value, projection)))
    assert_close(random_feature_attention(query, key, value, projection), expected.numpy(), "attention", tolerance=1e-5)
    unshifted = random_feature_attention(query, key, value, projection, eps=0.0)
    assert (unshifted - expected).abs().max() > 0.01


def test_random_features_of_bfloat16_lose_no_more_than_their_inputs():
    query, key, value = (torch.randn(3, 2, 500, 64) / 4).bfloat16()
    projection = torch.randn(32, 64)
    expected = reference.random_feature_attention(*(x.double() for x in (query, key, value, projection))).float()
    output = random_feature_attention(query, key, value, projection).float()
    assert (output - expected).norm() < 2**-8 * expected.norm()


def test_half_precision_is_finite_and_within_two_percent_of_the_spread():
    record = measure("vitae-t", "cpu")
    assert record["float32"]["max_over_std"] < 2e-5
    for dtype in ("bfloat16", "float16"):
        assert record[dtype]["finite"] and record[dtype]["finite_at_100_times"]
        assert record[dtype]["max_over_range"] < 0.02 and record[dtype]["rms_over_std"] < 0.02


def test_constants_that_parity_hardly_sees():
    for preset in ("vitae-s", "vitae-b", "vitaev2-s"):
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config_from_preset(preset))
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                assert module.eps == (1e-5 if "reduction_cell" in name else 1e-6), name
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.eps, module.momentum) == (1e-5, 0.1), name
            elif isinstance(module, nn.Dropout) and "reduction_cell" in name and preset == "vitae-s":
                assert module.p == (0.0 if name.endswith("mlp.dropout") else 0.1), name  # inside the MLP, and after it
    assert inspect.signature(random_feature_attention).parameters["eps"].default == 1e-8
