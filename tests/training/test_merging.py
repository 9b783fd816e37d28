# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Grouped convolutions with merged groups compute what the groups do, forward and backward."""

import pytest
import torch
from helpers import images
from torch import nn
from transformers import AutoModelForImageClassification, set_seed

from vitae_hf.training import merging
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.merging import MergedConv2d, merge_groups
from vitae_hf.training.trainer import ViTAETrainer


def clock(seconds_by_merged: dict[int, float], monkeypatch):
    """Each way of merging takes so many seconds."""
    merging.fastest.clear()
    monkeypatch.setattr(MergedConv2d, "seconds", lambda self, _, merged: seconds_by_merged.get(merged, 9.0))


@pytest.mark.parametrize(
    "channels, groups, choices", [((16, 32), 8, [1, 2, 4, 8]), ((96, 48), 6, [1, 2]), ((64, 64), 1, [1])]
)
def test_every_way_of_merging_gives_the_values_and_gradients_of_the_groups(channels, groups, choices):
    conv = nn.Conv2d(*channels, 3, stride=2, padding=1, groups=groups).double()
    merged = MergedConv2d(conv)
    assert merged.choices == choices and merged.weight is conv.weight
    feature_map = torch.randn(2, channels[0], 9, 7, dtype=torch.float64, requires_grad=True)
    inputs = (feature_map, conv.weight, conv.bias)
    expected = conv(feature_map)
    towards = torch.randn_like(expected)
    for count in choices:
        output = merged.convolve(feature_map, count)
        torch.testing.assert_close(output, expected)
        for found, plain in zip(
            torch.autograd.grad(output, inputs, towards), torch.autograd.grad(conv(feature_map), inputs, towards)
        ):
            torch.testing.assert_close(found, plain)


def test_the_fastest_way_is_measured_once_for_each_shape(monkeypatch):
    merging.fastest.clear()
    measured = []
    seconds = MergedConv2d.seconds

    def count(self, feature_map, merged):
        measured.append((tuple(feature_map.shape), merged))
        return (seconds(self, feature_map, merged) > 0) / merged  # as if the widest were the fastest

    monkeypatch.setattr(MergedConv2d, "seconds", count)
    conv = MergedConv2d(nn.Conv2d(16, 16, 3, groups=4))
    for _ in range(2):
        conv(torch.randn(1, 16, 8, 8))
    assert conv.merged == 4 and measured == [((1, 16, 8, 8), merged) for merged in (1, 2, 4)]
    conv(torch.randn(1, 16, 8, 9))
    with torch.no_grad():  # without a backward pass another way may be faster
        conv(torch.randn(1, 16, 8, 9))
    assert len(measured) == 9 and len(merging.fastest) == 3


def train(config, folder, **arguments) -> dict[str, torch.Tensor]:
    set_seed(3)
    model = AutoModelForImageClassification.from_config(config)
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images(8))]
    shared = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none"}
    shared |= {
        "optim": "sgd",
        "use_cpu": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    trainer = ViTAETrainer(model, ViTAETrainingArguments(folder, **shared, **arguments), train_dataset=data)
    trainer.train()
    return trainer.model.state_dict()


def test_training_with_merged_groups_gives_the_weights_of_training_without(tiny_config, tmp_path, monkeypatch):
    clock({2: 1.0}, monkeypatch)
    expected, found = train(tiny_config(), tmp_path), train(tiny_config(), tmp_path, merge_groups=True)
    assert set(merging.fastest.values()) == {2} and list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_with_merged_groups_saves_and_loads_as_an_ordinary_one(tiny_config, tmp_path, monkeypatch):
    clock({2: 1.0}, monkeypatch)
    model = AutoModelForImageClassification.from_config(tiny_config()).eval()
    expected = model(images()).logits
    merge_groups(model)
    torch.testing.assert_close(model(images()).logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images()).logits, expected)


def test_a_network_without_such_convolutions_is_refused():
    with pytest.raises(ValueError, match="grouped convolutions, got Linear"):
        merge_groups(nn.Linear(2, 2))
