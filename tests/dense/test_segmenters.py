"""UperNet on every backbone: it trains whole, reloads, and begins with a classifier or an autoencoder, or goes on."""

import pytest
import torch
from dense_networks import NAMES, assert_reloads, unreached
from helpers import class_token_config, images, pyramid_config, windowed_config
from transformers import AutoBackbone, AutoModelForSemanticSegmentation

from vitae_hf import PRESETS, ViTAEBackbone, ViTAEForImageClassification, ViTAEForPreTraining, config_from_preset
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.model import load_segmenter, new_segmenter


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_upernet_trains_every_parameter_and_reloads_with_equal_outputs(backbone_config, size, tmp_path):
    model = new_segmenter(backbone_config(), NAMES, head_channels=16)
    outputs = model(images(2, *size), labels=torch.randint(0, 5, (2, *size)))
    assert outputs.logits.shape == (2, 5, *size)
    outputs.loss.backward()
    assert unreached(model) == []
    assert_reloads(model, tmp_path, images(2, *size))
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path).backbone) is type(model.backbone)


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith(("-l", "-h"))])
def test_every_preset_is_a_backbone_of_upernet(preset):
    config = dense_config(config_from_preset(preset))
    with torch.device("meta"):
        model = new_segmenter(config, NAMES, head_channels=8)
    first = config.total_stride // 4 if config.has_class_token else 4
    strides = [first * 2**level for level in range(len(model.backbone.channels))]
    maps = model.backbone(torch.empty(1, 3, 64, 64, device="meta")).feature_maps
    assert [tuple(feature_map.shape[1:]) for feature_map in maps] == [
        (channels, 64 // stride, 64 // stride) for channels, stride in zip(model.backbone.channels, strides)
    ]


def test_a_backbone_that_gave_tokens_to_another_head_gives_maps_to_a_segmenter():
    config = dense_config(class_token_config(cell_stages=True, reshape_hidden_states=False))
    assert config.out_features == ["p2", "p3", "p4", "p5"] and config.reshape_hidden_states


def test_a_backbone_begins_with_a_classifiers_weights(tmp_path):
    classifier = ViTAEForImageClassification(pyramid_config()).eval()
    classifier.save_pretrained(tmp_path)
    backbone = ViTAEBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage3"]).eval()
    with torch.no_grad():
        maps = backbone(images()).feature_maps
        expected = classifier(images(), output_hidden_states=True).hidden_states[2:]
    assert all(torch.equal(*pair) for pair in zip(maps, expected))
    built = AutoBackbone.from_config(backbone.config)
    assert built.load_state_dict(backbone.state_dict()) and built.channels == backbone.channels == [24, 32]


def test_a_segmenter_begins_with_a_classifier_or_goes_on_as_it_was(tmp_path):
    classifier = ViTAEForImageClassification(class_token_config())
    classifier.save_pretrained(tmp_path / "classifier")
    model = load_segmenter(tmp_path / "classifier", NAMES, 16, feature_pyramid_channels=16, frozen_stages=1)
    expected = classifier.vitae.stages[0].normal_cells[1].mlp.fc1.weight
    assert torch.equal(model.backbone.vitae.stages[0].normal_cells[1].mlp.fc1.weight, expected)
    assert not model.backbone.vitae.stages[0].normal_cells[1].mlp.fc1.weight.requires_grad
    model.save_pretrained(tmp_path / "segmenter")
    assert load_segmenter(tmp_path / "segmenter", NAMES).backbone.config.frozen_stages == 1
    again = load_segmenter(tmp_path / "segmenter", {0: "x", 1: "y"}, frozen_stages=0)
    assert again.config.num_labels == 2 and again.decode_head.classifier.weight.shape[0] == 2
    assert torch.equal(again.decode_head.fpn_bottleneck.conv.weight, model.decode_head.fpn_bottleneck.conv.weight)
    assert all(parameter.requires_grad for parameter in again.parameters())
    state = classifier.state_dict()
    del state["vitae.stages.0.normal_cells.0.mlp.fc1.weight"]
    classifier.save_pretrained(tmp_path / "classifier", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights of ViTAEBackbone: \['vitae.stages.0.normal_cells.0.mlp.fc1"):
        load_segmenter(tmp_path / "classifier", NAMES, 16)


def test_a_segmenter_begins_with_a_masked_autoencoder(tmp_path):
    ViTAEForPreTraining(class_token_config(conv_kernel_size=1)).save_pretrained(tmp_path)
    model = load_segmenter(tmp_path, NAMES, 16)
    assert model.backbone.vitae.stages[0].normal_cells[0].conv_branch[0].conv.kernel_size == (3, 3)
    model.save_pretrained(tmp_path / "segmenter")
    assert_reloads(model, tmp_path / "segmenter", images())


def test_a_segmenter_goes_on_with_the_maps_it_had(tmp_path):
    config = dense_config(windowed_config(), out_features=["stage2", "stage3"])
    new_segmenter(config, NAMES, 16).save_pretrained(tmp_path)
    model = load_segmenter(tmp_path, NAMES)
    assert model.backbone.out_features == ["stage2", "stage3"] and len(model.decode_head.lateral_convs) == 1
    with pytest.raises(ValueError, match="or has them of other sizes: .*decode_head"):
        load_segmenter(tmp_path, NAMES, out_features=["stage1", "stage3"])
