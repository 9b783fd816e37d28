"""Backbones give the stages' maps at any image size, however they are loaded, and keep frozen stages as they are."""

import copy
import json

import pytest
import torch
from helpers import CONFIGS, class_token_config, images, pyramid_config, windowed_config
from torch import nn
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

from vitae_hf import ViTAEBackbone, ViTAEForPreTraining, config_from_preset


def backbone(config):
    """In eval mode, with BatchNorms that have seen data and positions that are not zero."""
    model = AutoBackbone.from_config(config)
    if config.is_plain:
        nn.init.normal_(model.vitae.embeddings.position_embeddings, std=0.2)
    with torch.no_grad():
        model.train()(images(4))
    return model.eval()


@pytest.mark.parametrize("make_config", [pyramid_config, windowed_config])
def test_maps_of_a_picture_that_is_not_square_equal_the_models_stages(make_config):
    model = backbone(make_config(out_features=["stem", "stage1", "stage2", "stage3"]))
    pixel_values = images(2, 64, 96)
    maps = model(pixel_values).feature_maps
    assert [tuple(found.shape[1:]) for found in maps] == [(3, 64, 96), (16, 16, 24), (24, 8, 12), (32, 4, 6)]
    assert model.channels == [3, 16, 24, 32]
    expected = model.base_model(pixel_values, output_hidden_states=True).hidden_states
    assert all(torch.equal(found, state) for found, state in zip(maps, expected))


def test_a_class_token_backbone_gives_its_patches_as_a_map():
    model = backbone(class_token_config(out_features=["stem", "stage1"]))
    maps = model(images(2, 32, 96)).feature_maps
    assert [tuple(found.shape) for found in maps] == [(2, 32, 2, 6)] * 2 and model.channels == [32, 32]
    tokens = model.vitae(images(2, 32, 96), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(maps[1][:, :, 1, 4], tokens[:, 1 + 1 * 6 + 4])


def test_a_class_token_backbone_makes_a_feature_pyramid_when_asked():
    model = backbone(class_token_config(feature_pyramid_channels=12))
    assert model.config.out_features == ["p2", "p3", "p4", "p5"] and model.channels == [12] * 4
    maps = model(images(2, 64, 96)).feature_maps
    assert [tuple(found.shape[2:]) for found in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    sum(found.square().sum() for found in model.train()(images(2, 64, 96)).feature_maps).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    chosen = AutoBackbone.from_config(class_token_config(feature_pyramid_channels=12, out_features=["stage1", "p4"]))
    assert chosen.channels == [32, 12]


CELL_STAGE_FIELDS = ("cell_stages", "apply_layernorm", "reshape_hidden_states", "return_class_token")


@pytest.mark.parametrize("pyramid", [{}, {"feature_pyramid_channels": 12}])
def test_a_folder_from_before_cells_were_stages_gives_the_map_of_its_last_cell(pyramid, tmp_path):
    names = ["stem", "stage1", *(["p3"] if pyramid else [])]
    model = backbone(class_token_config(out_features=names, **pyramid))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    old = {name: value for name, value in saved.items() if name not in CELL_STAGE_FIELDS}
    assert len(old) == len(saved) - 4
    (tmp_path / "config.json").write_text(json.dumps(old))
    found = ViTAEBackbone.from_pretrained(tmp_path)(images(2, 50, 96), output_hidden_states=True)
    assert all(map(torch.equal, found.feature_maps, model(images(2, 50, 96)).feature_maps))
    last = found.hidden_states[-1][:, 1:].transpose(1, 2)
    assert len(found.hidden_states) == 2 and torch.equal(found.feature_maps[1].flatten(2), last)


@pytest.mark.parametrize("kind", ["class_token", "rotated"])
def test_each_cell_of_a_plain_variant_is_a_stage_when_asked(kind, tmp_path):
    AutoModelForImageClassification.from_config(CONFIGS[kind](depths=(3,))).save_pretrained(tmp_path)
    model = ViTAEBackbone.from_pretrained(tmp_path, cell_stages=True, out_indices=[0, 1, 3])
    assert model.stage_names == ["stem", "stage1", "stage2", "stage3"] and model.channels == [32] * 3
    seen = []
    for cell in model.vitae.stages[0].normal_cells:
        cell.register_forward_hook(lambda cell, inputs, output: seen.append(output))
    outputs = model(images(2, 32, 96), output_hidden_states=True)
    assert len(seen) == 3 and all(map(torch.equal, outputs.hidden_states[1:], seen))
    first = int(model.config.has_class_token)
    for feature_map, index in zip(outputs.feature_maps, (0, 1, 3), strict=True):
        tokens = outputs.hidden_states[index][:, first:]
        assert feature_map.shape == (2, 32, 2, 6) and torch.equal(feature_map[:, :, 1, 4], tokens[:, 1 * 6 + 4])
    model.save_pretrained(tmp_path / "again")
    again = ViTAEBackbone.from_pretrained(tmp_path / "again")(images(2, 32, 96))
    assert all(map(torch.equal, again.feature_maps, outputs.feature_maps))


def test_tokens_come_with_the_class_token_or_without_and_normalised_by_an_autoencoders_layernorm(tmp_path):
    autoencoder = ViTAEForPreTraining(class_token_config(conv_kernel_size=1)).eval()
    nn.init.normal_(autoencoder.layernorm.weight)
    autoencoder.save_pretrained(tmp_path)
    options = {"apply_layernorm": True, "reshape_hidden_states": False}
    model, report = ViTAEBackbone.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(report.values())
    tokens = model(images()).feature_maps[0]
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(tokens, autoencoder.encode(images()))  # to rounding, since the kernels grew to 3×3
    bare = ViTAEBackbone.from_pretrained(tmp_path, return_class_token=False, **options)
    assert torch.equal(bare(images()).feature_maps[0], tokens[:, 1:])
    uncut = images(2, 70, 79)  # what is no whole patch is cut off
    assert torch.equal(model(uncut).feature_maps[0], model(uncut[..., :64, :64]).feature_maps[0])


def test_frozen_stages_count_cells_where_cells_are_stages():
    model = AutoBackbone.from_config(class_token_config(cell_stages=True, frozen_stages=1))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = ("vitae.embeddings.", "vitae.stages.0.normal_cells.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert all(parameter.requires_grad for parameter in AutoBackbone.from_config(class_token_config()).parameters())


def test_the_size_of_a_patch_divides_and_has_two_sides():
    patch_size = class_token_config().patch_size
    assert patch_size == 16 and 224 // patch_size == 14 and (patch_size[0], patch_size[1]) == (16, 16)


def test_the_presets_maps_have_the_documented_strides():
    for name, strides in (("vitae-s", (4, 8, 16)), ("vitaev2-s", (4, 8, 16, 32))):
        config = config_from_preset(name)
        config.out_indices = list(range(1, 1 + len(strides)))
        with torch.device("meta"):
            maps = AutoBackbone.from_config(config)(torch.empty(1, 3, 448, 672)).feature_maps
        expected = [(size, 448 // s, 672 // s) for size, s in zip(config.hidden_sizes, strides)]
        assert [tuple(found.shape[1:]) for found in maps] == expected


def test_a_pyramid_given_when_a_folder_is_loaded_has_its_maps(tmp_path):
    AutoModelForImageClassification.from_config(class_token_config()).save_pretrained(tmp_path)
    model = ViTAEBackbone.from_pretrained(tmp_path, feature_pyramid_channels=12)
    assert model.out_features == ["p2", "p3", "p4", "p5"] and len(model(images()).feature_maps) == 4
    chosen = ViTAEBackbone.from_pretrained(tmp_path, feature_pyramid_channels=12, out_features=["p3"])
    assert chosen.channels == [12] and chosen(images()).feature_maps[0].shape[2:] == (8, 8)


def test_any_size_is_filled_up_with_zeros(tiny_config):
    model = backbone(tiny_config())
    pixel_values = images(1, 50, 77)
    found = model(pixel_values).feature_maps[0]
    filled = model(nn.functional.pad(pixel_values, (0, 3, 0, 14))).feature_maps[0]
    assert torch.equal(found, filled) and found.shape[2:] == (4, 5)
    if not model.config.is_plain:  # maps of other strides end with the picture too
        model.out_features = ["stem", "stage1", "stage2"]
        assert [tuple(found.shape[2:]) for found in model(pixel_values).feature_maps] == [(50, 77), (13, 20), (7, 10)]


def test_outputs_follow_the_library(tiny_config):
    model = backbone(tiny_config(attn_implementation="eager"))
    plain = model(images())
    assert plain.hidden_states is None and plain.attentions is None
    full = model(images(), output_hidden_states=True, output_attentions=True)
    assert len(full.hidden_states) == 1 + model.config.num_stages and full.attentions
    assert torch.equal(model(images(), return_dict=False)[0][0], plain.feature_maps[0])


def test_backbones_load_from_any_folder_of_the_family_and_back(tiny_config, tmp_path):
    classifier = AutoModelForImageClassification.from_config(tiny_config())
    classifier.save_pretrained(tmp_path / "classifier")
    model = type(backbone(tiny_config())).from_pretrained(tmp_path / "classifier", out_indices=[0, 1])
    expected = classifier.eval().base_model(images(), output_hidden_states=True).hidden_states[1]
    if model.config.is_plain:
        expected = expected[:, int(model.config.has_class_token) :].transpose(1, 2)
    assert torch.equal(model(images()).feature_maps[1].flatten(2), expected.flatten(2))
    model.save_pretrained(tmp_path / "backbone")
    again = type(model).from_pretrained(tmp_path / "backbone")
    assert again.out_indices == [0, 1]
    assert all(map(torch.equal, again(images()).feature_maps, model(images()).feature_maps))
    base, report = AutoModel.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert torch.equal(base.eval()(images()).last_hidden_state, classifier.base_model(images()).last_hidden_state)
    assert all("pooler" in name for name in report["missing_keys"])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reload", [False, True])
def test_frozen_stages_stay_as_they_are(kind, reload, tmp_path):
    """Weights and statistics, in training; the others train. Loading alone would make all weights trainable again."""
    model = AutoBackbone.from_config(CONFIGS[kind](frozen_stages=1, hidden_dropout_prob=0.5))
    if reload:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    frozen = (f"{model.base_model_prefix}.stages.0.", f"{model.base_model_prefix}.embeddings.")
    if reload:
        model.train()  # a new one is in training mode
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(frozen) for name in trained)
    output = model(images()).feature_maps[0]
    if trained:  # the plain variants have but one stage
        output.square().sum().backward()
        torch.optim.AdamW(trained.values(), lr=0.1).step()
    for name, value in model.state_dict().items():
        stays = name.startswith(frozen) or "random_projection" in name
        assert torch.equal(value, before[name]) == stays, name
