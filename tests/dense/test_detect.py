"""vitae detect: from scenes to a folder that finds objects, resumed exactly, by recipes that are read whole."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from boxed_data import changed, write_coco
from dense_networks import SCENES
from helpers import ASSETS, IMAGE, REPOSITORY, as_words, drawn, last_line, python_path_without, run
from huggingface_hub import ModelCard
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from vitae_hf import ViTAEForImageClassification, config_from_preset
from vitae_hf.commands import detect as detect_command
from vitae_hf.commands import evaluate
from vitae_hf.commands.detect import Detection
from vitae_hf.dense.detection.data import DetectionDataset, load_boxed_images
from vitae_hf.dense.detection.models import (
    DETECTORS,
    HeadSize,
    detector_backbone,
    load_detector,
    make_processor,
    new_detector,
)
from vitae_hf.evaluation.detections import as_objects, find_objects, of_segments
from vitae_hf.failures import run_command
from vitae_hf.files import RECIPES


def options(output, **values) -> list[str]:
    common = {"preset": "vitae-nano", "report_to": "none", "save_strategy": "no", "head_channels": 32}
    common |= {"decoder_layers": 1, "num_queries": 10, "image_size": 64, "per_device_train_batch_size": 4}
    common |= {"per_device_eval_batch_size": 4, "output_dir": output, "disable_tqdm": True, "pictures": 2}
    if "model_name_or_path" in values:
        del common["preset"]
    if values.get("detector") == "deformable_detr":
        common["decoder_layers"] = 2
    if "short_sides" in values:
        del common["image_size"]
    return as_words(common | values)


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """Some of the shipped scenes: four to train on, three of them to evaluate."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = datasets.load_dataset(str(SCENES), split="validation")
    for split, count in (("train", 4), ("validation", 3)):
        scenes.select(range(count)).to_parquet(folder / f"{split}-0.parquet")
    return folder


@pytest.fixture(scope="module")
def eight_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes = datasets.load_dataset(str(SCENES), split="validation").select(range(8))
    for split in ("train", "validation"):
        scenes.to_parquet(folder / f"{split}-0.parquet")
    return folder


def test_the_command_trains_saves_draws_and_its_folder_finds_what_was_evaluated(few_scenes, tmp_path):
    record = detect_command.main(options(tmp_path, dataset=few_scenes, max_steps=2, learning_rate=1e-3))
    assert record["updates"] == 2 and record["map_percent"] >= 0 and "eval_loss" not in record
    figures = json.loads((tmp_path / "detection_metrics.json").read_text())
    assert figures["map"] == pytest.approx(record["map_percent"], abs=0.01) and len(figures["ap"]) == 11
    assert {"predictions.png", "training_curves.png", "eval_results.json"} <= {path.name for path in tmp_path.iterdir()}
    card = ModelCard.load(tmp_path / "README.md")
    assert "RTDetrForObjectDetection on ViTAE" in card.text and "| Ankle boot |" in card.text
    assert card.data.pipeline_tag == "object-detection" and "3 pictures" in card.text
    picture = PIL.Image.open(ASSETS / "chelsea.png").convert("RGB")
    detect = pipeline("object-detection", model=str(tmp_path))
    found = detect(picture, threshold=0.01)
    own = find_objects(detect.model, AutoImageProcessor.from_pretrained(tmp_path), picture, 0.01)
    assert [entry["score"] for entry in found] == own["scores"].tolist() and len(found)


def test_the_picture_shows_boxes_of_truth_and_prediction(few_scenes, tmp_path):
    detect_command.main(options(tmp_path, dataset=few_scenes, max_steps=1, detector="faster_rcnn", head_channels=8))
    size, colours = drawn(tmp_path / "predictions.png")
    assert size[0] > 1500 and len({colour for colour in colours if max(colour) - min(colour) > 90}) > 100


@pytest.mark.parametrize("detector", ["deformable_detr", "mask2former", "mask_rcnn"])
def test_detectors_take_pictures_of_different_sizes(few_scenes, tmp_path, detector):
    sizes = {"short_sides": 48, "long_side": 100, "per_device_eval_batch_size": 1, "pictures": 1}
    record = detect_command.main(options(tmp_path, dataset=few_scenes, max_steps=1, detector=detector, **sizes))
    assert ("mask_map_percent" in record) == DETECTORS[detector].with_masks
    if DETECTORS[detector].with_masks:
        picture = PIL.Image.open(ASSETS / "chelsea.png").convert("RGB")
        segment = pipeline("image-segmentation", model=str(tmp_path))
        assert all(one["mask"].size == picture.size for one in segment(picture, threshold=0.0, subtask="instance"))


def test_a_run_resumes_exactly_and_averages_weights(few_scenes, tmp_path):
    common = {"dataset": few_scenes, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "ema_decay": 0.5}
    common |= {"drop_path_rate": 0.1, "per_device_train_batch_size": 2, "pictures": 1}
    record = detect_command.main(options(tmp_path, **common))
    whole = AutoModelForObjectDetection.from_pretrained(record["model"]).state_dict()
    assert record["model"].endswith("ema") and (tmp_path / "ema" / "predictions.png").exists()
    resumed = detect_command.main(options(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **common))
    weights = AutoModelForObjectDetection.from_pretrained(resumed["model"]).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())


@pytest.mark.parametrize("detector", list(DETECTORS))
def test_a_detector_begins_with_a_classifier_or_goes_on_as_it_was(tmp_path, detector):
    classifier = ViTAEForImageClassification(config_from_preset("vitae-nano"))
    classifier.save_pretrained(tmp_path / "classifier")
    words = options(tmp_path, detector=detector, model_name_or_path=tmp_path / "classifier", dataset="x")
    model = Detection.parse(words).build_model(dict(enumerate("abc")))
    expected = classifier.vitae.stages[2].normal_cells[1].mlp.fc1.weight
    assert any(torch.equal(weight, expected) for name, weight in model.state_dict().items() if "mlp.fc1" in name)
    model.save_pretrained(tmp_path / "detector")
    words = options(tmp_path, detector=detector, model_name_or_path=tmp_path / "detector", dataset="x", frozen_stages=1)
    again = Detection.parse(words).build_model({0: "x", 1: "y"})
    assert again.config.num_labels == 2 and not all(weight.requires_grad for weight in again.parameters())
    before, classes = model.state_dict(), DETECTORS[detector].class_weights
    for name, weight in again.state_dict().items():
        assert any(part in name for part in classes) or torch.equal(weight, before[name]), name
    other = "faster_rcnn" if detector != "faster_rcnn" else "mask_rcnn"
    words = options(tmp_path, detector=other, model_name_or_path=tmp_path / "detector", dataset="x")
    with pytest.raises(ValueError, match=f"holds a {detector}: give --detector {detector}"):
        Detection.parse(words).build_model({0: "x"})


def test_a_mask_has_the_box_around_its_pixels():
    masks = torch.zeros(2, 6, 8)
    masks[0, 2:5, 1:6] = masks[1, 0, 7] = 1
    found = of_segments(masks, [{"score": 0.9, "label_id": 3}, {"score": 0.5, "label_id": 0}])
    assert found["boxes"].tolist() == [[1, 2, 6, 5], [7, 0, 8, 1]] and found["labels"].tolist() == [3, 0]
    assert of_segments(torch.full((6, 8), -1), [])["masks"].shape == (0, 6, 8)


def test_the_loss_of_accumulated_batches_is_their_mean(few_scenes, tmp_path):
    losses = []
    for parts in (1, 2):
        words = options(tmp_path, dataset=few_scenes, max_steps=1, learning_rate=0.0, gradient_accumulation_steps=parts)
        trainer = Detection.parse([*words, "--per_device_train_batch_size", "2"]).build_trainer()
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.4)


def test_a_rate_in_steps_follows_its_epochs_behind_a_warm_up(few_scenes, tmp_path):
    steps = ["--lr_steps", "8", "11", "--num_train_epochs", "12", "--warmup_steps", "3"]
    words = options(tmp_path, dataset=few_scenes, learning_rate=1e-2, warmup_learning_rate=1e-5)
    trainer = Detection.parse([*words, *steps]).build_trainer()
    trainer.create_optimizer_and_scheduler(120)
    rates = []
    for _ in range(120):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [1e-5, *[1e-5 + (1e-2 - 1e-5) * step / 3 for step in (1, 2)], *[1e-2] * 77, *[1e-3] * 30, *[1e-4] * 10]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*rcnn*.yaml")) + [RECIPES / "rt-detr-garment-scenes.yaml"])
def test_the_recipes_are_made_of_arguments_and_say_what_to_expect(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    given = [] if "dataset" in recipe else ["--dataset", "x", "--model_name_or_path", "y"]
    parsed = Detection.parse(["--config", str(path), "--output_dir", str(tmp_path), *given])
    values = {name: value for part in vars(parsed).values() for name, value in vars(part).items()}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy", "lr_scheduler_type", "report_to"}  # enumerations, a list


def test_what_does_not_go_together_is_refused_before_training(few_scenes, tmp_path):
    for values, message in [
        ({"detector": "mask2former", "head_channels": 40}, "mask2former must be a multiple of 32 wide, got 40"),
        ({"detector": "deformable_detr", "decoder_layers": 1}, "deformable_detr must have at least 2 layers, got 1"),
        ({"image_size": 100}, r"image_size of rt_detr must be multiples of 32, got \[100, 100\]"),
        ({"image_size": 0}, "`image_size` must be one or two numbers above 0"),
        ({"num_queries": 0}, "--num_queries must be at least 1, got 0"),
        ({"image_column_name": "photo"}, "has no images in a column 'photo'"),
        ({"objects_column_name": "boxes"}, "has no objects in a column 'boxes'"),
        ({"crop_prob": 2}, "`crop_prob` must be at least 0 and at most 1"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor does not go with detection"),
    ]:
        with pytest.raises(ValueError, match=message):
            detect_command.main(options(tmp_path, dataset=few_scenes, max_steps=1, **values))
    sizes = {"detector": "faster_rcnn", "short_sides": 64, "per_device_eval_batch_size": 2}
    write_coco(tmp_path / "coco", changed("images", 1, width=60))
    for split in ("train2017", "val2017"):
        PIL.Image.new("RGB", (60, 30)).save(tmp_path / "coco" / split / "b.png")
    with pytest.raises(ValueError, match="differ in size, .* per_device_eval_batch_size to 1"):
        detect_command.main(options(tmp_path, dataset=tmp_path / "coco", max_steps=1, **sizes))


@pytest.mark.parametrize("box_format, corner", [("xywh", "95, 25"), ("xyxy", "90, 20")])
def test_a_bad_annotation_ends_the_command_with_one_sentence(tmp_path, capsys, box_format, corner):
    write_coco(tmp_path / "coco", changed("annotations", bbox=[5, 5, 90, 20]))
    words = options(tmp_path / "out", dataset=tmp_path / "coco", max_steps=1, box_format=box_format)
    with pytest.raises(SystemExit, match="1"):
        run_command(detect_command.main, words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"train2017/a.png: object 0 has a box from 5, 5 to {corner}, outside the picture of 40×30 pixels" in said
    assert said.startswith("error: ") and not (tmp_path / "out" / "config.json").exists()


WITHOUT_PACKAGE = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation
for folder in sys.argv[2:]:
    auto = AutoModelForUniversalSegmentation if folder.endswith("mask2former") else AutoModelForObjectDetection
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    outputs = model(**processor(sys.argv[1], return_tensors="pt"))
    torch.save([value for value in outputs.values() if torch.is_tensor(value)], f"{folder}/out.pt")
assert "vitae_hf" not in sys.modules
"""


@pytest.mark.slow
def test_a_detector_that_went_on_loads_without_the_package(tmp_path):
    path, models, size = python_path_without("vitae_hf", "__editable__", folder=tmp_path / "site"), {}, [64, 96]
    for name in set(DETECTORS) - {"faster_rcnn"}:
        backbone = detector_backbone(config_from_preset("vitae-nano"), name)
        new_detector(name, backbone, {0: "a"}, HeadSize(32, 2, 5)).save_pretrained(tmp_path / "first")
        folder = tmp_path / name
        models[folder] = load_detector(tmp_path / "first", name, {0: "a"})
        models[folder].save_pretrained(folder)
        make_processor(name, dict(zip(("height", "width"), size))).save_pretrained(folder)
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", WITHOUT_PACKAGE, IMAGE, *models]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, model in models.items():
        pixels = AutoImageProcessor.from_pretrained(folder)(str(IMAGE), return_tensors="pt")
        with torch.no_grad():
            own = [value for value in model.eval()(**pixels).values() if torch.is_tensor(value)]
        assert len(own) > 1 and all(map(torch.equal, own, torch.load(folder / "out.pt"))), folder.name


HEART = {
    "rt_detr": {"max_steps": 200, "decoder_layers": 2, "num_queries": 20, "max_grad_norm": 1.0},
    "mask_rcnn": {"max_steps": 120},
    "mask2former": {"max_steps": 150, "decoder_layers": 2, "num_queries": 20},
}


@pytest.mark.slow
@pytest.mark.parametrize("detector", list(HEART))
def test_a_detector_learns_eight_scenes_by_heart(eight_scenes, tmp_path, detector):
    learning = {
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "lr_scheduler_type": "cosine",
        "flip_prob": 0,
        "crop_prob": 0,
    }
    learning |= {"head_channels": 64, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    words = options(tmp_path, dataset=eight_scenes, detector=detector, **learning, **HEART[detector])
    record = detect_command.main([*words, "--image_size", "96", "128"])
    assert record["map_50_percent"] > 90
    assert record.get("mask_map_50_percent", 100) > 90
    for data in (eight_scenes, renumbered(eight_scenes, tmp_path / "data")):
        words = {"model_name_or_path": record["model"], "dataset": data, "output": tmp_path / "out"}
        assert round(evaluate.main(as_words(words))["map_percent"], 2) == record["map_percent"]


def renumbered(source, folder):
    """The same data with the classes numbered the other way round."""
    data = datasets.load_dataset(str(source), split="validation")
    names = data.features["objects"]["category"].feature.names
    last = len(names) - 1
    features = data.features.copy()
    features["objects"] = {**features["objects"], "category": datasets.List(datasets.ClassLabel(names=names[::-1]))}
    data = data.map(
        lambda row: {"objects": {**row["objects"], "category": [last - c for c in row["objects"]["category"]]}},
        features=features,
    )
    data.to_parquet(folder / "validation.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_run_that_was_stopped_or_killed_goes_on_to_the_same_weights(few_scenes, tmp_path, name):
    common = {"dataset": few_scenes, "max_steps": 30, "save_strategy": "steps", "logging_steps": 1}
    common |= {"save_steps": 1000 if name == "SIGTERM" else 4, "ema_decay": 0.9}
    whole = detect_command.main(options(tmp_path / "whole", **common))
    words = options(tmp_path / "stopped", **common, resume_from_checkpoint="last")
    command = [sys.executable, "-m", "vitae_hf", "detect", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == 6:
            break
    process.send_signal(getattr(signal, name))
    last = process.communicate(timeout=300)[0].splitlines()[-1:]
    if name == "SIGTERM":
        assert process.returncode == 143 and 6 <= json.loads(last[0])["stopped_at_step"] < 30
    else:
        saved = {path.name for path in (tmp_path / "stopped").glob("checkpoint-*")}
        assert process.returncode == -9 and "checkpoint-4" in saved and "checkpoint-28" not in saved
    resumed = last_line(run("detect", *words))
    models = [AutoModelForObjectDetection.from_pretrained(record["model"]) for record in (whole, resumed)]
    weights = models[1].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in models[0].state_dict().items())


def test_another_data_set_is_measured_against_its_own_objects(few_scenes, tmp_path, monkeypatch):
    """The detector finds what is in the pictures of that one, whatever it is shown."""
    trainer = Detection.parse(options(tmp_path, dataset=few_scenes, detector="faster_rcnn")).build_trainer()
    scenes = datasets.load_dataset(str(SCENES), split="validation").select(range(10, 14))
    scenes.to_parquet(tmp_path / "other" / "validation-0.parquet")
    data, names = load_boxed_images(str(tmp_path / "other"))
    other = DetectionDataset(data["validation"], trainer.eval_dataset.transform, names)

    def find(model, inputs, *others, **ignored):
        for row in inputs["rows"]:
            found = vars(other.objects(row)[0])
            trainer._found[row] = {**found, "scores": np.ones(len(found["labels"]))}
        return None, None, None

    monkeypatch.setattr(trainer, "prediction_step", find)
    assert trainer.evaluate(other)["eval_map"] == 100 and trainer.evaluate()["eval_map"] < 50
    both = trainer.evaluate({"other": other, "own": trainer.eval_dataset})
    assert both["eval_other_map"] == 100 and both["eval_own_map"] < 50
    assert trainer.predict(other).metrics["test_map"] == 100


def test_what_a_detector_found_is_on_the_cpu_whatever_the_model_is_on():
    def boxes(outputs, threshold, target_sizes):
        return [{"scores": torch.zeros(2, device="cuda"), "masks": torch.zeros(2, 3, 4, device="cuda")}]

    with FakeTensorMode():
        (found,) = as_objects(SimpleNamespace(post_process_object_detection=boxes), {}, [(3, 4)], 0.5)
    assert {name: values.device.type for name, values in found.items()} == {"scores": "cpu", "masks": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["rt_detr", "mask_rcnn"])
def test_two_processes_train_and_measure_every_picture_once(few_scenes, tmp_path, detector):
    """Three pictures on two processes: one of them is seen twice and counts once."""
    common = {"dataset": few_scenes, "detector": detector, "per_device_eval_batch_size": 1, "use_cpu": True}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = options(tmp_path / "two", max_steps=3, per_device_train_batch_size=2, **common)
    done = subprocess.run(
        [*start, REPOSITORY / "scripts" / "train_detection.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    again = options(tmp_path / "one", model_name_or_path=tmp_path / "two", max_steps=1, learning_rate=0.0, **common)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "two")
    trainer = Detection.parse(again).build_trainer()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert trainer.evaluate()["eval_map"] == pytest.approx(record["map_percent"], abs=0.01)
    assert np.isfinite(record["map_percent"])


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_a_detector_is_evaluated_as_its_training_did(few_scenes, tmp_path, detector):
    """By its folder alone, also where the data number the classes in another order."""
    record = detect_command.main(options(tmp_path / "model", dataset=few_scenes, detector=detector, max_steps=2))
    words = {"model_name_or_path": record["model"], "dataset": few_scenes, "output": tmp_path / "out"}
    measured = evaluate.main(as_words(words))
    other = evaluate.main(as_words({**words, "dataset": renumbered(few_scenes, tmp_path / "data")}))
    assert other["map_percent"] == measured["map_percent"] > 0
    names = [name for name in record if name.endswith("map_percent") or name.endswith("map_50_percent")]
    assert len(names) == (4 if detector == "mask_rcnn" else 2)
    assert {name: round(measured[name], 2) for name in names} == {name: record[name] for name in names}
    written = json.loads((tmp_path / "out" / "eval_metrics.json").read_text())
    figures = json.loads((tmp_path / "model" / "detection_metrics.json").read_text())
    assert written["ap_percent"] == figures["ap"] and (tmp_path / "out" / "predictions.png").stat().st_size > 10_000
    for more, message in [
        ({"short_side": 48}, "--short_side goes with a segmenter; .* is a detector"),
        ({"image_column_name": "photo"}, "has no images in a column 'photo'"),
        ({"objects_column_name": "boxes"}, "has no objects in a column 'boxes'"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.main(as_words({**words, **more}))
