"""The authors' checkpoints are read safely, recognised, converted whole, or refused in one sentence."""

import argparse
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ASSETS,
    RunsCode,
    class_token_config,
    images,
    original_weights,
    pyramid_config,
    write_malicious,
)
from safetensors.torch import load_file

from vitae_hf import (
    ViTAEForImageClassification,
    config_from_preset,
    convert_original_state_dict,
    detect_preset,
    load_original_checkpoint,
)
from vitae_hf.hub.conversion import config_from_original, convert_checkpoint, read_labels
from vitae_hf.hub.original_names import original_layout


def meta_weights(name: str, **overrides) -> dict[str, torch.Tensor]:
    """Shapes of an original checkpoint without its values."""
    weights = {}
    for original, parts in original_layout(config_from_preset(name, **overrides)).items():
        shape = next(iter(parts.values()))
        weights[original] = torch.empty((len(parts) * shape[0], *shape[1:]) if shape else (), device="meta")
    return weights


@pytest.mark.parametrize(
    "name",
    """vitae-t vitae-6m vitae-13m vitae-13m-paper vitae-s vitae-b vitae-l vitae-h
    vitaev2-s vitaev2-48m vitaev2-b""".split(),
)
def test_every_preset_is_recognised(name):
    weights = meta_weights(name, num_labels=21841)
    assert detect_preset(weights) == name
    assert config_from_original(weights).num_labels == 21841
    convert_original_state_dict(weights)


def test_the_position_table_gives_the_image_size():
    config = config_from_original(meta_weights("vitae-b", image_size=384))
    assert config.image_size == 384


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="not the tensors of a ViTAE variant"):
        detect_preset({"layer1.conv.weight": torch.zeros(1)})


def test_a_head_that_does_not_fit_names_no_classes():
    """Its rows could be as many as a file has bytes."""
    weights = original_weights(config_from_preset("vitae-nano")) | {"head.weight": torch.zeros(10**6, 1)}
    with pytest.raises(ValueError, match=r"wrong shape: head.weight is \(1000000, 1\), expected \(\d+, 64\)"):
        convert_original_state_dict(weights)
    assert config_from_original(weights).num_labels < 10**6


def test_every_misfit_is_listed():
    config = pyramid_config()
    weights = original_weights(config)
    del weights["layers.0.RC.attn.w"], weights["head.bias"]
    weights["extra.weight"] = torch.zeros(1)
    weights["layers.2.NC.0.attn.qkv.weight"] = torch.zeros(96, 31)
    with pytest.raises(ValueError) as error:
        convert_original_state_dict(weights, config)
    for line in (
        "4 tensors do not fit",
        "missing: layers.0.RC.attn.w",
        "missing: head.bias",
        "not expected: extra.weight",
        "wrong shape: layers.2.NC.0.attn.qkv.weight is (96, 31), expected (96, 32)",
    ):
        assert line in str(error.value)


# ----------------------------------------------------------------------------------------------- file layouts


LAYOUTS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "ema": lambda weights: {"state_dict_ema": weights, "state_dict": {name: 0 * v for name, v in weights.items()}},
    "training": lambda weights: {
        "state_dict": weights,
        "args": argparse.Namespace(model="ViTAE_S", lr=1e-3, mean=None),
        "metric": np.float64(75.3),
        "history": np.arange(3.0),
        "output": pathlib.Path("runs") / "1",
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_is_read(layout, prefix, zipped, tmp_path):
    weights = original_weights(pyramid_config())
    content = LAYOUTS[layout]({f"{prefix}{name}": value for name, value in weights.items()})
    torch.save(content, tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=zipped)
    read = load_original_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


def write_malicious_pickle(path, weights):
    path.write_bytes(pickle.dumps(RunsCode(f"touch {path}.executed")))


@pytest.mark.parametrize(
    "write, message",
    [
        (write_malicious, "asks to run (posix|nt).system when it is read; refused"),
        (write_malicious_pickle, "asks for more than weights when it is read|asks for more than weights; refused"),
        (lambda path, weights: path.write_text("<!DOCTYPE html>"), "not a PyTorch file: it begins with b'<!DOCTYPE"),
        (lambda path, weights: path.write_bytes(b""), "not a PyTorch file: it begins with b''"),
        (lambda path, weights: torch.save({0: torch.zeros(1)}, path), "holds no state dict"),
        (lambda path, weights: torch.jit.script(torch.nn.Linear(2, 2)).save(path), "damaged or no file of weights"),
        (lambda path, weights: torch.save([1, 2], path), "holds no state dict"),
        (lambda path, weights: torch.save({"state_dict": {}}, path), "holds no state dict"),
    ],
)
def test_a_bad_file_gets_one_plain_sentence_and_runs_nothing(write, message, tmp_path):
    path = tmp_path / "bad.pth"
    write(path, original_weights(pyramid_config()))
    with pytest.raises(ValueError, match=message) as error:
        load_original_checkpoint(path)
    assert "bad.pth" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.executed"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_named_wherever_the_damage_is(zipped, tmp_path):
    """Cut short, and with bytes overwritten at 300 places; a reader that copes must give every tensor its shape."""
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {"state_dict": {"a": torch.zeros(3), "b": torch.ones(2, 2)}, "epoch": 3},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    content, generator = path.read_bytes(), np.random.default_rng(0)
    damaged = [content[: len(content) // 2]]
    for place in generator.integers(2, len(content), 300):
        damaged.append(content[:place] + generator.bytes(3) + content[place + 3 :])
    refused = 0
    for version in damaged:
        path.write_bytes(version)
        try:
            read = load_original_checkpoint(path)
            assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())
        except ValueError as error:
            refused += 1
            assert "checkpoint.pth" in str(error)
    assert refused > 100


# ---------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def nano_checkpoint(tmp_path):
    """An original-format file of the smallest preset, and its weights."""
    weights = original_weights(config_from_preset("vitae-nano"))
    torch.save({"state_dict": weights}, tmp_path / "nano.pth")
    return tmp_path / "nano.pth", weights


def test_a_folder_holds_the_weights_labels_and_image_size(nano_checkpoint, tmp_path):
    path, weights = nano_checkpoint
    labels = [f"thing {index}" for index in range(10)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    record = convert_checkpoint(path, tmp_path / "out", labels=tmp_path / "labels.json")
    assert (record["preset"], record["parameters"], record["num_labels"]) == ("vitae-nano", 216_074, 10)
    converted = convert_original_state_dict(weights)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == converted.keys() and all(torch.equal(saved[name], converted[name]) for name in saved)
    model = ViTAEForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(labels)) and model.config.label2id["thing 3"] == 3
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == {
        "height": 64,
        "width": 64,
    }
    assert not list(tmp_path.glob(".*"))
    card = (tmp_path / "out" / "README.md").read_text()  # there is nothing that the authors publish about `vitae-nano`
    assert "of the network `vitae-nano`" in card and "The authors print no figure that we know" in card


def test_a_used_folder_and_wrong_labels_are_refused_before_anything_is_written(nano_checkpoint, tmp_path):
    path, _ = nano_checkpoint
    with pytest.raises(FileExistsError, match="exists already"):
        convert_checkpoint(path, tmp_path)
    (tmp_path / "labels.json").write_text('["only one"]')
    with pytest.raises(ValueError, match="JSON list of 10 class names"):
        convert_checkpoint(path, tmp_path / "out", labels=tmp_path / "labels.json")
    (tmp_path / "labels.json").write_text("{cat: 0}")
    with pytest.raises(ValueError, match="labels.json must be a JSON list of class names: Expecting property name"):
        convert_checkpoint(path, tmp_path / "out", labels=tmp_path / "labels.json")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(nano_checkpoint, tmp_path, monkeypatch):
    path, _ = nano_checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitae_hf.hub.conversion.ViTAEImageProcessorPil.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(path, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"nano.pth"}


def test_a_folder_that_does_not_verify_is_not_written(nano_checkpoint, tmp_path):
    """Variances below zero, of which BatchNorm makes no numbers."""
    path, weights = nano_checkpoint
    spoilt = {name: torch.full_like(value, -1) if "running_var" in name else value for name, value in weights.items()}
    torch.save(spoilt, path)
    with pytest.raises(ValueError, match="gives outputs that are not finite"):
        convert_checkpoint(path, tmp_path / "out", verify=ASSETS / "chelsea.png")
    assert {entry.name for entry in tmp_path.iterdir()} == {"nano.pth"}


def test_imagenet_classes_get_their_names(tmp_path):
    weights = original_weights(config_from_preset("vitae-nano", num_labels=1000))
    torch.save(weights, tmp_path / "nano.pth")
    convert_checkpoint(tmp_path / "nano.pth", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = config["id2label"]
    assert (names["0"], names["281"], len(names)) == ("tench, Tinca tinca", "tabby, tabby cat", 1000)
    assert config["label2id"] == {name: int(number) for number, name in names.items()}  # two of the classes are cranes
    assert (names["134"], names["517"]) == ("crane", "crane2")


def test_without_timm_the_sentence_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=r'needs timm, .*: pip install "vitae-hf\[train\]", or pass --labels'):
        read_labels(None, 1000)
    assert read_labels(None, 10) is None


def test_a_class_token_checkpoint_of_any_depth_converts():
    config = class_token_config(depths=(3,))
    weights = original_weights(config)
    model = ViTAEForImageClassification(config)
    model.load_state_dict(convert_original_state_dict(weights, config))
    assert torch.equal(model.vitae.embeddings.position_embeddings, weights["layers.0.RC.pos_embed"])
    assert model(images()).logits.isfinite().all()
