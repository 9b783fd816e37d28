"""Masked image models of every kind: what they hide, what they are scored by, and what other classes make of theirs."""

import pytest
import torch
from helpers import any_size, images, windowed_config
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers.modeling_outputs import MaskedImageModelingOutput

from vitae_hf.training.optimization import parameter_groups


def masked_model(config):
    """One in evaluation mode, whose BatchNorms have seen data and whose mask has a colour."""
    model = AutoModelForMaskedImageModeling.from_config(config)
    with torch.no_grad():
        model.mask_token.copy_(torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1))
        model.train()(images(4))
    return model.eval()


def some_patches(model, batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    patches = height * width // model.config.patch_size**2
    return torch.rand(batch, patches) < 0.6


def painted(model, pixel_values: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images on which each masked patch is painted over, patch by patch, and which pixels those are."""
    side, pixel_values = model.config.patch_size, pixel_values.clone()
    hidden = torch.zeros_like(pixel_values, dtype=torch.bool)
    columns = pixel_values.shape[-1] // side
    for image, patch in masked.nonzero().tolist():
        top, left = patch // columns * side, patch % columns * side
        hidden[image, :, top : top + side, left : left + side] = True
        pixel_values[image, :, top : top + side, left : left + side] = model.mask_token[0]
    return pixel_values, hidden


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
def test_the_network_sees_the_colour_in_place_of_masked_patches_and_the_loss_is_theirs(tiny_config, height, width):
    model, pixel_values = masked_model(tiny_config()), images(2, height, width)
    masked = some_patches(model, 2, height, width)
    seen, hidden = painted(model, pixel_values, masked)
    outputs = model(pixel_values, bool_masked_pos=masked, **any_size(model))
    shown = model(seen, **any_size(model))
    assert isinstance(outputs, MaskedImageModelingOutput) and shown.loss is None
    assert torch.equal(outputs.reconstruction, shown.reconstruction) and shown.reconstruction.shape == seen.shape
    assert torch.allclose(outputs.loss, (outputs.reconstruction - pixel_values)[hidden].abs().mean(), rtol=1e-5)


@torch.no_grad()
def test_what_is_masked_reaches_the_loss_as_a_target_and_the_reconstruction_not_at_all(tiny_config):
    model, pixel_values = masked_model(tiny_config()), images()
    masked = some_patches(model)
    _, hidden = painted(model, pixel_values, masked)
    outputs = model(pixel_values, bool_masked_pos=masked)
    changed = model(torch.where(hidden, torch.rand_like(pixel_values), pixel_values), bool_masked_pos=masked)
    assert torch.equal(changed.reconstruction, outputs.reconstruction) and changed.loss != outputs.loss


@torch.no_grad()
def test_each_token_of_the_last_stage_is_decoded_into_its_own_square(tiny_config):
    model = masked_model(tiny_config()).double()
    outputs = model(images(2, 48, 80).double(), output_hidden_states=True, **any_size(model))
    weight, bias = model.decoder[0].weight[:, :, 0, 0], model.decoder[0].bias
    tokens = outputs.hidden_states[-1]
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    token = tokens[1, -15:][8]  # of the second row and the fourth of five columns; a class token comes first
    square = (weight @ token + bias).view(3, 16, 16)
    assert torch.allclose(outputs.reconstruction[1, :, 16:32, 48:64], square)


def test_gradients_reach_every_parameter_under_checkpointing_and_bfloat16(tiny_config):
    model = AutoModelForMaskedImageModeling.from_config(tiny_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(), bool_masked_pos=some_patches(model)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.any() for parameter in model.parameters())
    decays = {name: g["weight_decay"] for g in parameter_groups(model, 1.0, 0.05, 0.5) for name in g["names"]}
    rates = {name: group["lr"] for group in parameter_groups(model, 1.0, 0.05, 0.5) for name in group["names"]}
    assert decays["mask_token"] == 0 and decays["decoder.0.weight"] == 0.05 and rates["decoder.0.weight"] == 1


def test_no_mask_at_all_costs_nothing_and_masks_may_be_numbers(tiny_config):
    """As transformers' common tests have it, whose masks are zeros, and its example, whose masks are integers."""
    model = masked_model(tiny_config())
    masked = some_patches(model)
    assert model(images(), bool_masked_pos=torch.zeros_like(masked)).loss == 0
    loss, reconstruction = model(images(), bool_masked_pos=masked.long(), return_dict=False)
    assert loss == model(images(), bool_masked_pos=masked).loss and reconstruction.shape == (2, 3, 64, 64)


def test_a_mask_of_another_shape_is_named(tiny_config):
    model = masked_model(tiny_config())
    side, patches = model.config.patch_size, 64 * 64 // model.config.patch_size**2
    expected = rf"patches of {side}×{side} pixels\), here \(2, {patches}\); got \(2, 7\)"
    with pytest.raises(ValueError, match=expected):
        model(images(), bool_masked_pos=torch.zeros(2, 7))


def test_half_precision_takes_images_of_either_type(tiny_config):
    model = masked_model(tiny_config())
    masked, half = some_patches(model), masked_model(tiny_config()).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for pixel_values in (images(), images().to(torch.bfloat16)):
        outputs = half(pixel_values, bool_masked_pos=masked)
        assert outputs.reconstruction.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
        assert outputs.loss.item() == pytest.approx(model(images(), bool_masked_pos=masked).loss.item(), rel=0.02)


@torch.no_grad()
def test_folders_go_back_and_forth_and_what_is_new_is_said(tiny_config, tmp_path):
    model = masked_model(tiny_config())
    model.save_pretrained(tmp_path / "masked")
    masked = some_patches(model)
    again = AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "masked")
    expected = model(images(), bool_masked_pos=masked, output_hidden_states=True)
    assert torch.equal(again(images(), bool_masked_pos=masked).reconstruction, expected.reconstruction)

    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path / "masked", output_loading_info=True)
    pooler = {f"{model.base_model_prefix}.pooler.layernorm.{name}" for name in ("weight", "bias")}
    new = {"classifier.weight", "classifier.bias"} | (pooler if model.config.is_plain else set())
    assert report["missing_keys"] == new and not report["unexpected_keys"] and not report["mismatched_keys"]
    seen, _ = painted(model, images(), masked)
    base = AutoModel.from_pretrained(tmp_path / "masked")
    for network in (loaded.base_model, base):
        assert torch.equal(network(seen, output_hidden_states=True).hidden_states[-1], expected.hidden_states[-1])

    loaded.save_pretrained(tmp_path / "classifier")
    back, report = AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert report["missing_keys"] == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert not report["unexpected_keys"] and not back.mask_token.any() and back.decoder[0].weight.isfinite().all()


@pytest.mark.slow
def test_compiled_it_computes_the_same(tiny_config):
    model = masked_model(tiny_config())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    masked = some_patches(model)
    outputs, expected = (network(images(), bool_masked_pos=masked) for network in (compiled, model))
    assert torch.allclose(outputs.reconstruction, expected.reconstruction, atol=1e-5)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_attention_is_given_on_request_and_takes_any_backend():
    model = masked_model(windowed_config(attn_implementation="eager"))
    outputs = model(images(), output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 7 and len(outputs.hidden_states) == 4
    model.set_attn_implementation("sdpa")
    assert torch.allclose(model(images()).reconstruction, outputs.reconstruction, atol=1e-5)
