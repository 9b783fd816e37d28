# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Programs for images of one size: each is written, loaded again in its runtime and compared with the model."""

import platform

import numpy as np
import pytest
import torch
from helpers import ASSETS, CONFIGS
from transformers import AutoModel, AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessorPil
from vitae_hf.commands import export
from vitae_hf.deployment import exporting
from vitae_hf.deployment.exporting import export_folder, export_model, load_exported, read_batch, shapes_to_compare
from vitae_hf.deployment.fixed_size import FixedSizeProgram


PICTURES = [str(ASSETS / name) for name in ("chelsea.png", "sneaker.png")]
RUNTIMES = {
    "executorch": ("executorch", RuntimeError),  # the runtime's own refusal
    "litert": ("litert_torch", ValueError),
    "torch-aoti": ("torch", ValueError),
}
"""Each format, the package that it takes, and the error that its program raises for an image of another size."""


def write_tiny(kind: str, folder, auto_class=AutoModelForImageClassification):
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIGS[kind]()).eval()
    model.save_pretrained(folder)
    ViTAEImageProcessorPil(size=64).save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class_token", "windowed"])
@pytest.mark.parametrize("format", list(RUNTIMES))
def test_a_program_computes_what_the_model_does_and_refuses_other_sizes(format, kind, tmp_path):
    package, error = RUNTIMES[format]
    pytest.importorskip(package, reason=f"{package} is not installed")
    model = write_tiny(kind, tmp_path)
    record = export.main([str(tmp_path), "--format", format])
    assert all(check["max_over_std"] < 1e-4 and check["same_top1_percent"] == 100 for check in record["checks"])
    assert len(record["checks"]) == (3 if format == "torch-aoti" else 2)
    assert record["bytes"] > 1e5 and "not_compared" not in record
    program, count = load_exported(tmp_path / format), 5 if format == "torch-aoti" else 1
    pixel_values = read_batch(ViTAEImageProcessorPil(), PICTURES, count, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        found = program(**exporting.forward_inputs(model, pixel_values)).logits
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())
    with pytest.raises(error):
        program(**exporting.forward_inputs(model, torch.zeros(1, 3, 96, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class_token", "pyramid", "windowed"])
def test_a_core_ml_program_computes_what_the_model_does_and_where_it_cannot_run_the_record_says_so(kind, tmp_path):
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    import core_ml

    model = write_tiny(kind, tmp_path)
    record = export.main([str(tmp_path), "--format", "coreml"])
    if platform.system() != "Darwin":
        assert record["checks"] == [] and record["not_compared"] == "Core ML runs on macOS and iOS alone"
    pixel_values = read_batch(ViTAEImageProcessorPil(), PICTURES, 1, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
    found = core_ml.run(tmp_path / "coreml" / "model.mlpackage", pixel_values)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.slow
def test_core_ml_refuses_rotated_windows_and_nothing_is_left(tmp_path):
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    write_tiny("rotated", tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Core ML only supports tensors with rank <= 5"):
        export.main([str(tmp_path), "--format", "coreml"])
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_program_of_a_headless_model_gives_features_by_name(tmp_path):
    pytest.importorskip("litert_torch", reason="litert_torch is not installed")
    write_tiny("pyramid", tmp_path, AutoModel)
    record = export_folder(tmp_path, "litert", PICTURES)
    outputs = load_exported(tmp_path / "litert")(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "last_hidden_state": (1, 16, 32),
        "pooler_output": (1, 32),
    }
    assert "same_top1_percent" not in record["checks"][0]


def test_a_program_of_one_size_says_what_it_takes():
    program = FixedSizeProgram(lambda pixel_values: {"logits": pixel_values.sum((1, 2, 3))}, [None, 3, 64, 64])
    assert program(torch.ones(2, 3, 64, 64), interpolate_pos_encoding=True).logits.tolist() == [12288, 12288]
    for shape in ((1, 3, 96, 64), (3, 64, 64), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"takes `pixel_values` of any × 3 × 64 × 64, got \d × "):
            program(torch.zeros(shape))
    with pytest.raises(ValueError, match="of 1 × 3 × 64 × 64, got 2 × 3 × 64 × 64"):
        FixedSizeProgram(program.run, [1, 3, 64, 64])(torch.zeros(2, 3, 64, 64))


def test_every_picture_is_compared_alone_where_a_program_takes_no_batch():
    model = AutoModelForImageClassification.from_config(CONFIGS["pyramid"]())
    assert shapes_to_compare(model, "executorch", 2) == [(0, 1, 64, 64), (1, 1, 64, 64)]
    assert shapes_to_compare(model, "torch-aoti", 1) == [(0, 1, 64, 64), (0, 3, 64, 64)]
    assert (
        len({size for _, *size in map(tuple, shapes_to_compare(model, "onnx", 2)) for size in [tuple(size[1:])]}) == 3
    )


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [
        ("executorch", "executorch", "executorch"),
        ("litert", "litert_torch", "litert"),
        ("coreml", "coremltools", "coreml"),
    ],
)
def test_a_missing_runtime_is_one_sentence_that_names_its_extra(format, package, extra, tmp_path, monkeypatch):
    found = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ImportError, match=rf"the format {format} takes {package}, not installed here: .*\[{extra}\]"):
        export_folder("vitae-nano-fashion", format, PICTURES, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_formats_that_are_written_to_folders_are_not_made_in_memory():
    with pytest.raises(ValueError, match="torch-aoti is not made in memory: `write_model` writes it"):
        export_model(AutoModelForImageClassification.from_config(CONFIGS["pyramid"]()), "torch-aoti")
