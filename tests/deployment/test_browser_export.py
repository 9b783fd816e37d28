"""What `vitae export --format web` writes: programs, settings and pages, seen from Python. test_page.py runs them."""

import json

import pytest
import torch
import yaml
from helpers import ASSETS, original_weights, pyramid_config
from transformers import AutoModel, AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessorPil, convert_original_state_dict
from vitae_hf.commands import export
from vitae_hf.deployment import browser, exporting
from vitae_hf.deployment.browser import RUNTIME, export_for_browser, find_runtime, open_program, write_card, write_page
from vitae_hf.deployment.exporting import read_batch


pytest.importorskip("transformers.exporters.runners", reason="exporting takes transformers 5.23")
pytest.importorskip("onnxscript")
PICTURES = [str(ASSETS / name) for name in ("chelsea.png", "sneaker.png")]


def save(folder, size=64, **overrides):
    config = pyramid_config(**overrides)
    model = AutoModelForImageClassification.from_config(config)
    model.load_state_dict(convert_original_state_dict(original_weights(config), config))
    model.save_pretrained(folder)
    channels = {"image_mean": [0.5] * config.num_channels, "image_std": [0.5] * config.num_channels}
    ViTAEImageProcessorPil(size=size, **channels).save_pretrained(folder)
    return folder


@pytest.fixture
def runtime(tmp_path):
    """A folder with `node_modules`, as far as an export looks at it."""
    files = tmp_path / "project" / "node_modules" / "onnxruntime-web" / "dist"
    files.mkdir(parents=True)
    for name in RUNTIME:
        (files / name).write_text(name)
    return files


def test_one_file_gives_scores_and_features_and_what_disagrees_is_left_out(tmp_path, monkeypatch):
    monkeypatch.delitem(browser.FILES, "float16")  # traced anew, which takes seconds; test_page.py runs it
    monkeypatch.setitem(exporting.TOLERANCES, "int8", ("rms_over_std", 1e-4))
    source = save(tmp_path / "model", problem_type="multi_label_classification")
    record = export.main([str(source), "--format", "web", "--images", *PICTURES])
    assert list(record["programs"]) == ["float32"] and "disagrees with the model" in record["refused"]["int8"]
    folder = source / "web"
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]  # weights inside
    pixel_values = read_batch(ViTAEImageProcessorPil(), PICTURES, 3, 96, 64)
    outputs = open_program(folder / "onnx" / "model.onnx")(pixel_values)
    with torch.no_grad():
        expected = {**AutoModel.from_pretrained(source)(pixel_values)}
        expected["logits"] = AutoModelForImageClassification.from_pretrained(source)(pixel_values).logits
    for name in ("logits", "pooler_output", "last_hidden_state"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-5 * expected[name].std().item())
    config, settings = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    assert config["model_type"] == "vit" and len(config["id2label"]) == 5
    assert config["problem_type"] == "multi_label_classification"
    assert settings["size"] == {"shortest_edge": 71} and settings["crop_size"] == {"height": 64, "width": 64}
    assert json.loads((folder / "original" / "config.json").read_text())["model_type"] == "vitae"


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ({"size": {"height": 64, "width": 96}}, "models of square pictures, as transformers.js resizes to; got 64×96"),
        ({"num_channels": 1}, "models of three channels, got 1"),
        ({"problem_type": "regression"}, "a regression or a single label is not: choose another format"),
    ],
)
def test_what_transformers_js_cannot_run_is_refused_and_nothing_is_written(tmp_path, made, sentence):
    source = save(tmp_path / "model", **made)
    with pytest.raises(ValueError, match=sentence):
        export_for_browser(source, PICTURES)
    assert not (source / "web").exists()


def test_the_runtime_is_found_in_the_nearest_node_modules_and_a_missing_one_is_a_sentence(
    runtime, tmp_path, monkeypatch
):
    inner = runtime.parents[2] / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert find_runtime() == runtime == find_runtime(runtime.parent) == find_runtime(runtime.parents[2])
    (runtime / RUNTIME[2]).unlink()
    with pytest.raises(FileNotFoundError, match="ONNX Runtime Web, which is not in node_modules of .*: `npm install"):
        find_runtime()
    with pytest.raises(FileNotFoundError, match="which is not whole in .*b: `npm install"):
        find_runtime(inner)


def test_options_of_one_format_are_refused_with_another():
    with pytest.raises(ValueError, match="--page and --runtime go with the format web, not with onnx"):
        export.main(["folder", "--format", "onnx", "--page"])
    with pytest.raises(ValueError, match="leave --quantize out"):
        export.main(["folder", "--format", "web", "--quantize", "int8"])


def test_another_model_makes_another_version_of_the_page_and_a_space_names_it(runtime, tmp_path):
    workers = []
    for weights in ("one", "other"):
        folder = tmp_path / weights
        folder.mkdir()
        (folder / "model.onnx").write_text(weights)
        (folder / "export.json").write_text(json.dumps({"name": "org/mine"}))
        write_page(folder, runtime)
        workers.append((folder / "service-worker.js").read_text())
    assert workers[0] != workers[1] and "{version}" not in workers[0]
    write_card(folder)
    fields = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert fields["sdk"] == "static" and fields["title"] == "What does mine see?"
    assert (folder / fields["app_file"]).is_file() and len(fields["short_description"]) <= 60
