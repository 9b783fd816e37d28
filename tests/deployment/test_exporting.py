# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Exported programs compute what the model does, at any size; the ONNX one without torch."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ASSETS, CONFIGS, REPOSITORY, original_weights
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from vitae_hf import (
    ViTAEBackbone,
    ViTAEForImageClassification,
    ViTAEImageProcessorPil,
    config_from_preset,
    convert_original_state_dict,
)
from vitae_hf.commands import export
from vitae_hf.deployment import exporting
from vitae_hf.deployment.exporting import export_folder, forward_inputs, load_exported, read_batch
from vitae_hf.failures import run_command
from vitae_hf.hub.publishing import check_folder
from vitae_hf.layers_vitae import ViTAEConvLayer


pytest.importorskip("transformers.exporters.runners", reason="exporting takes transformers 5.23")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")
PICTURES = [str(ASSETS / name) for name in ("chelsea.png", "sneaker.png")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind of network, as the converter writes it."""
    root = tmp_path_factory.mktemp("models")
    for kind, tiny_config in CONFIGS.items():
        config = tiny_config()
        model = AutoModelForImageClassification.from_config(config)
        model.load_state_dict(convert_original_state_dict(original_weights(config), config))
        model.save_pretrained(root / kind)
        ViTAEImageProcessorPil(size=config.image_size).save_pretrained(root / kind)
    return {kind: root / kind for kind in CONFIGS}


@pytest.fixture(scope="module")
def export_onnx(folders):
    """A function that exports the folder of a kind, once."""
    return cache(lambda kind: export.main([str(folders[kind]), "--format", "onnx"]))


def model_of(folder: Path):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, pixel_values: torch.Tensor) -> np.ndarray:
    return model(**forward_inputs(model, pixel_values)).logits.numpy()


@pytest.mark.parametrize(
    "kind",
    ["pyramid", "class_token", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("windowed", "rotated"))],
)
def test_an_onnx_program_computes_the_same_at_any_size_and_refuses_remainders(folders, export_onnx, kind):
    checks = export_onnx(kind)["checks"]
    model, processor = model_of(folders[kind]), ViTAEImageProcessorPil()
    assert all(check["same_top1_percent"] == 100 and check["max_over_std"] < 1e-5 for check in checks)
    assert len({(check["height"], check["width"]) for check in checks}) == 3
    session = onnxruntime.InferenceSession(folders[kind] / "onnx" / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    stride = model.config.total_stride
    for batch, height, width in ((1, stride, stride), (4, 7 * stride, 3 * stride)):
        pixel_values = read_batch(processor, PICTURES, batch, height, width)
        outputs = session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0]
        np.testing.assert_allclose(outputs, logits(model, pixel_values), rtol=0, atol=1e-5 * outputs.std())
    with pytest.raises(Exception, match="cannot be reshaped"):
        session.run(None, {"pixel_values": np.zeros((1, 3, 64, 4 * stride + 1), np.float32)})


@pytest.mark.parametrize(
    ("kind", "format"),
    [pytest.param("windowed", "torch", marks=pytest.mark.slow), ("class_token", "openvino")],
)
def test_other_formats_compute_the_same_when_loaded_again(folders, kind, format):
    if format == "openvino":
        pytest.importorskip("openvino")
    record = export_folder(folders[kind], format, PICTURES)
    assert max(check["max_over_std"] for check in record["checks"]) < 1e-5
    program, model = load_exported(folders[kind] / format), model_of(folders[kind])
    pixel_values = read_batch(ViTAEImageProcessorPil(), PICTURES, 4, 160, 96)
    outputs = program(**forward_inputs(model, pixel_values)).logits.numpy()
    np.testing.assert_allclose(outputs, logits(model, pixel_values), rtol=0, atol=1e-5 * outputs.std())
    assert type(program(**forward_inputs(model, pixel_values))) is ImageClassifierOutput
    if format == "torch":
        with pytest.raises(AssertionError, match="Guard failed"):
            program(pixel_values=torch.zeros(1, 3, 64, 65))


def test_narrow_groups_are_merged_for_runtimes_that_are_faster_so(folders, export_onnx):
    layers = [layer for layer in model_of(folders["class_token"]).modules() if isinstance(layer, ViTAEConvLayer)]
    assert {layer.conv.groups for layer in layers} == {8}
    export_onnx("class_token")
    program = onnx_ir.load(folders["class_token"] / "onnx" / "model.onnx")
    nodes = [node for node in program.graph if node.op_type == "Conv" and node.attributes["group"].value > 1]
    assert {(node.attributes["group"].value, node.inputs[1].shape[1]) for node in nodes} == {(2, 16), (2, 64)}


WITHOUT_TORCH = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "transformers", "vitae_hf")))  # importing these fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("picture", PICTURES)
def test_the_example_needs_no_torch_and_says_what_the_pipeline_says(folders, export_onnx, picture):
    export_onnx("pyramid")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(REPOSITORY / "examples" / "run_onnx.py")]
    done = subprocess.run([*command, str(folders["pyramid"]), picture], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label, score = done.stdout.strip().split(": ")
    processor = ViTAEImageProcessorPil.from_pretrained(folders["pyramid"])
    classify = pipeline("image-classification", model=model_of(folders["pyramid"]), image_processor=processor)
    expected = classify(picture, top_k=1)[0]
    assert label == expected["label"] and float(score) == pytest.approx(expected["score"], abs=2e-4)


@pytest.mark.slow
def test_an_int8_program_is_smaller_and_names_the_same_classes(folders, export_onnx):
    export_onnx("windowed")
    source = folders["windowed"]
    record = export.main([str(source), "--format", "onnx", "--quantize", "int8"])
    for check in record["checks"]:
        assert check["same_top1_percent"] == 100
        assert 1e-4 < check["rms_over_std"] < 0.2  # it is another function, but not much of one
    sizes = [(source / name / "model.onnx.data").stat().st_size for name in ("onnx", "onnx_int8")]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.slow
def test_a_program_that_does_not_run_is_refused_by_a_sentence(folders, tmp_path):
    """ONNX Runtime has no int8 product with what rotated windows multiply by."""
    with pytest.raises(ValueError, match="the int8 program for onnx does not run here: .*DynamicQuantizeMatMul"):
        export_folder(folders["rotated"], "onnx", PICTURES, tmp_path / "out", int8=True)
    assert not (tmp_path / "out").exists()


def test_what_disagrees_leaves_nothing_behind_and_an_earlier_export_as_it_was(folders, export_onnx, monkeypatch):
    export_onnx("class_token")
    source, program = folders["class_token"], folders["class_token"] / "onnx" / "model.onnx"
    before, names = program.read_bytes(), {path.name for path in source.iterdir()}
    monkeypatch.setitem(exporting.TOLERANCES, "float32", ("max_over_std", -1.0))
    with pytest.raises(ValueError, match="disagrees with the model .* on 1 pictures of 64×64 pixels"):
        export_folder(source, "onnx", PICTURES)
    assert program.read_bytes() == before and {path.name for path in source.iterdir()} == names


def test_an_earlier_export_that_cannot_be_moved_stays_and_one_that_can_is_replaced(tmp_path, monkeypatch):
    output = tmp_path / "onnx"
    output.mkdir()
    (output / exporting.MANIFEST).write_text("{}")
    (output / "model.onnx").write_text("before")
    rename = Path.rename

    def refuse(path, target):
        if path == output:
            raise PermissionError("in use")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError, match="in use"), exporting.replaced_folder(output):
            pass
    assert (output / "model.onnx").read_text() == "before" and list(tmp_path.iterdir()) == [output]
    with exporting.replaced_folder(output) as folder:
        (folder / "model.onnx").write_text("after")
    assert (output / "model.onnx").read_text() == "after" and list(tmp_path.iterdir()) == [output]


def test_a_clone_of_a_repository_is_no_export_to_replace(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / exporting.MANIFEST).write_text("{}")
    with pytest.raises(FileExistsError, match="is a clone of a repository: choose another --output"):
        with exporting.replaced_folder(tmp_path):
            pass
    assert (tmp_path / ".git").is_dir()


@pytest.mark.parametrize("channels", [1, 13])
def test_a_model_of_any_number_of_channels_is_exported_and_published_without_a_picture_of_ones_own(tmp_path, channels):
    config = config_from_preset("vitae-nano", num_channels=channels, num_labels=4)
    ViTAEForImageClassification(config).save_pretrained(tmp_path)
    numbers = {"image_mean": [0.5] * channels, "image_std": [0.3] * channels}
    ViTAEImageProcessorPil(size=64, **numbers).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("A card.")
    record = export_folder(tmp_path, "torch", None)
    assert record["checks"] and all(check["max_over_std"] < 1e-3 for check in record["checks"])
    _, outputs = check_folder(tmp_path, None)
    assert outputs.shape == (1, 4)


def test_what_cannot_be_exported_is_told_before_anything_is_written(folders, tmp_path, monkeypatch):
    source = folders["pyramid"]
    with pytest.raises(
        ValueError, match="must be one of onnx, torch, openvino, executorch, litert, coreml, torch-aoti; got 'tflite'"
    ):
        export_folder(source, "tflite", PICTURES)
    with pytest.raises(ValueError, match="int8 goes with the format onnx, not with torch"):
        export_folder(source, "torch", PICTURES, tmp_path / "out", int8=True)
    with pytest.raises(ValueError, match="say where to write with --output"):
        export_folder("org/name", "onnx", PICTURES)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no export"):
        export_folder(source, "torch", PICTURES, tmp_path / "taken")
    ViTAEBackbone(CONFIGS["pyramid"]()).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="holds ViTAEBackbone: only classifiers and headless models"):
        export_folder(tmp_path / "backbone", "torch", PICTURES)
    monkeypatch.setitem(exporting.PACKAGES, "torch", ("no_such_package",))
    with pytest.raises(ImportError, match="takes no_such_package, not installed here: .*export"):
        export_folder(source, "torch", PICTURES, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "backbone"}


def test_the_script_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(SystemExit) as stopped:
        run_command(export.main, [str(tmp_path), "--format", "torch"])
    assert stopped.value.code == 1
    assert "only classifiers and headless models of ViTAE" in capsys.readouterr().err.splitlines()[-1]


def test_a_headless_model_gives_features(folders, tmp_path):
    model = AutoModel.from_pretrained(folders["class_token"])
    model.save_pretrained(tmp_path / "headless")
    ViTAEImageProcessorPil(size=64).save_pretrained(tmp_path / "headless")
    record = export_folder(tmp_path / "headless", "torch", PICTURES)
    assert "same_top1_percent" not in record["checks"][0] and record["checks"][0]["max_over_std"] < 1e-5
    pixel_values = read_batch(ViTAEImageProcessorPil(), PICTURES, 2, 96, 64)
    outputs = load_exported(tmp_path / "headless" / "torch")(**forward_inputs(model, pixel_values))
    assert outputs.pooler_output.shape == (2, 32) and outputs.last_hidden_state.shape == (2, 1 + 6 * 4, 32)
