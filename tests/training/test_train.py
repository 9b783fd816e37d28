"""vitae train: recipes are read whole, and both of its uses run from data to a folder that loads."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import PIL.Image
import pytest
import torch
import yaml
from helpers import (
    DATA,
    LINES,
    REPOSITORY,
    as_words,
    class_token_config,
    drawn,
    last_line,
    options,
    rotated_config,
    run,
    write_several_columns,
)
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessor, ViTAEModel, config_from_preset
from vitae_hf.commands import evaluate, train
from vitae_hf.commands.detect import Detection
from vitae_hf.commands.pretrain import Pretraining
from vitae_hf.commands.segment import Segmentation
from vitae_hf.commands.train import Classification
from vitae_hf.files import RECIPES, find_model
from vitae_hf.hub.variants import VARIANTS


OTHERS = ("mae", "mim", "upernet", "mask-rcnn", "rt-detr")  # of other commands
TRAINING = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith(OTHERS))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_every_recipe_is_made_of_arguments_and_the_command_line_overrides_it(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    assert recipe.get("preset", path.stem) == path.stem
    common = ["--config", str(path), "--dataset", "imagenet", "--output_dir", str(tmp_path), "--report_to", "none"]
    if "preset" not in recipe:
        common += ["--model_name_or_path", "pretrained"]
    task = Classification.parse(common)
    training = task.training
    values = {**vars(task.run), **vars(task.augmentation), **vars(training)}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy"}  # those become enumerations
    share = recipe["per_device_train_batch_size"] / 512
    assert training.learning_rate == pytest.approx(float(recipe["base_learning_rate"]) * share)
    if "base_ema_decay" in recipe:
        assert training.ema_decay == pytest.approx(0.99996**share)
    larger = ["--per_device_train_batch_size", "128", "--gradient_accumulation_steps", "4"]
    changed = Classification.parse([*common, *larger]).training
    assert changed.learning_rate == pytest.approx(float(recipe["base_learning_rate"]))


def test_a_value_on_the_command_line_overrides_the_recipes_rule_for_it(tmp_path):
    common = [f"--config={RECIPES / 'vitae-t.yaml'}", "--dataset", "x", "--output_dir", str(tmp_path)]
    task = Classification.parse([*common, "--learning_rate", "3e-3", "--ema_decay=0.5"])
    training = task.training
    assert task.run.preset == "vitae-t" and training.num_train_epochs == 310
    assert training.learning_rate == 3e-3 and training.ema_decay == 0.5
    dashed = Classification.parse([*common, "--learning-rate", "3e-3", "--ema-decay=0.5"]).training
    assert dashed.learning_rate == 3e-3 and dashed.ema_decay == 0.5
    with pytest.raises(ValueError, match="--learning_rate and --base_learning_rate exclude each other"):
        Classification.parse([*common, "--learning_rate", "3e-3", "--base_learning_rate", "1e-3"])
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0, got -1.0"):
        Classification.parse([*common, "--learning_rate=-1"])
    with pytest.raises(ValueError, match="--conf"):
        Classification.parse(["--conf", "recipe.yaml", *common])


def test_every_published_variant_has_a_recipe():
    assert {path.stem for path in TRAINING} >= VARIANTS.keys() - {"vitae-13m-paper"} | {"vitae-b-rvsa"}


def test_the_recipe_for_scenes_runs_from_a_masked_autoencoder(tmp_path):
    """Its own steps, of a narrow network that begins as the page on pretraining shows."""
    encoder = ViTAEModel(class_token_config())
    weights = encoder.state_dict()
    weights["embeddings.position_embeddings"] = weights["embeddings.position_embeddings"][:, 1:]
    model = ViTAEForImageClassification(rotated_config(qkv_bias=False, num_labels=10))
    missing, unexpected = model.vitae.load_state_dict(weights, strict=False)
    assert all("relative_position" in name or "_windows." in name for name in missing)
    assert {name.rpartition(".")[-1] for name in unexpected} == {"bias", "cls_token"}
    model.save_pretrained(tmp_path / "begin")
    ViTAEImageProcessor(size=64).save_pretrained(tmp_path / "begin")
    arguments = options(config="vitae-b-rvsa", model_name_or_path=tmp_path / "begin", dataset=DATA, image_size=64)
    arguments += options(output_dir=tmp_path / "out", max_steps=2, dataloader_num_workers=0, train_share=0.01)
    record = train.main([*arguments, "--save_strategy", "no", "--eval_strategy", "no"])
    trained = ViTAEForImageClassification.from_pretrained(record["model"])
    assert trained.config.window_type == "rotated_apart" and trained.config.drop_path_rate == 0.1


def test_a_wrong_recipe_or_missing_model_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("preset: vitae-t\nmixup_alfa: 0.8\n")
    with pytest.raises(ValueError, match="no argument 'mixup_alfa'; did you mean 'mixup_alpha'"):
        Classification.parse(["--config", str(tmp_path / "recipe.yaml"), "--dataset", "x"])
    with pytest.raises(ValueError, match="20 training images do not fill one batch of 64"):
        arguments = options(preset="vitae-nano", dataset=DATA, per_device_train_batch_size=64, train_share=20 / 6000)
        train.main([*arguments, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="either --preset, to train from scratch, or --model_name_or_path"):
        Classification.parse(["--dataset", "x", "--output_dir", str(tmp_path)])


def test_from_scratch(tmp_path):
    arguments = options(
        preset="vitae-nano",
        dataset=DATA,
        output_dir=tmp_path / "out",
        max_steps=4,
        save_steps=2,
        ema_decay=0.9,
        report_to="tensorboard",
    )
    done = run("train", *arguments)
    record = last_line(done)
    assert re.search(r"32\.0/32\.0 \[.* images/s\]", done.stderr)
    assert 0 <= record["top1_percent"] <= record["top5_percent"] <= 100 and record["skipped"] == 0
    size, colours = drawn(tmp_path / "out" / "training_curves.png")
    assert size == (1560, 432) and set(LINES[:2]) <= colours  # three panels, of which two have two lines
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_top1"] == record["top1_percent"]
    assert list((tmp_path / "out" / "runs").rglob("events.out.tfevents.*"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == record["top1_percent"] and "216,074 parameters" in card.text
    assert ViTAEForImageClassification.from_pretrained(record["model"]).config.id2label[9] == "Ankle boot"
    with pytest.raises(
        ValueError, match="checkpoint-4 is of an earlier run: continue it by --resume_from_checkpoint last"
    ):
        train.main(arguments)
    names = tmp_path / "classes"
    write_class_folders(names, [f"class {number}" for number in range(10)])
    again = ["--resume_from_checkpoint", "last", "--dataset", str(names)]
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of a run with other id2label, .*T-shirt.* now are .*class 0"
    ):
        train.main([*arguments, *again])
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "out" / "checkpoint-4", elsewhere)
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for resume in ([], ["--resume_from_checkpoint", "last"], ["--resume_from_checkpoint", str(elsewhere)]):
        with pytest.raises(ValueError, match=r"--output_dir .*out holds a trained model, over which this run would"):
            train.main([*arguments, *resume])


def write_class_folders(folder, names):
    for number, name in enumerate(names):
        for index in range(4):
            path = folder / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (64, 64), (20 * number, 50 * index, 0)).save(path)


def test_what_would_be_lost_or_cannot_be_used_is_said_before_the_training(tmp_path):
    write_class_folders(tmp_path / "two", ["cats", "dogs"])
    write_class_folders(tmp_path / "one", ["cats"])
    ViTAEForImageClassification(config_from_preset("vitae-nano")).save_pretrained(tmp_path / "model")
    good = {"model_name_or_path": tmp_path / "model", "dataset": tmp_path / "two", "output_dir": tmp_path / "out"}
    for wrong, message in (
        ({"output_dir": tmp_path / "model"}, "--output_dir .*model is the model to begin with"),
        ({"output_dir": tmp_path / "two" / "outputs"}, "--output_dir .* lies in the data set .*two"),
        ({"dataset": tmp_path / "one"}, "one has one class, 'cats': a classifier tells at least two apart"),
        ({"crop_pct": 0}, "`crop_pct` must be above 0"),
        (
            {"metric_for_best_model": "accuracy"},
            "--metric_for_best_model must be one of top1, top5, loss; got 'accuracy'",
        ),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be at least 1, got 0"),
        ({"report_to": "newspaper"}, "--report_to newspaper: it must be of .*tensorboard.*, all or none"),
        ({"report_to": "comet_ml"}, "--report_to comet_ml: its package is not installed"),
        ({"prediction_loss_only": True}, "--prediction_loss_only leaves out the accuracy"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(options(**{**good, **wrong}))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_fine_tuning_on_a_folder_with_bad_pictures_and_new_classes(tmp_path):
    ViTAEForImageClassification(config_from_preset("vitae-nano")).save_pretrained(tmp_path / "model")
    for index in range(30):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 60), (8 * index, 0, 0)).save(path)
    path.write_text("no picture")
    arguments = options(
        model_name_or_path=tmp_path / "model",
        dataset=tmp_path / "images",
        output_dir=tmp_path / "out",
        max_steps=4,
        eval_share=0.2,
        save_strategy="no",
    )
    done = run("train", *arguments)
    assert done.returncode != 0 and f"cannot read {path}" in done.stderr
    shutil.rmtree(tmp_path / "out")  # the picture was held out, so that the failed run has left a model
    record = last_line(run("train", *arguments, "--on_bad_sample", "skip"))
    assert record["eval_split"] == "held_out"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "24 images of" in card and "the 6 images of the split `held_out`" in card
    assert record["skipped"] >= 1 and record["top5_percent"] == 100
    config = ViTAEForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == {0: "cat", 1: "dog"} and config.image_size == 64


@pytest.mark.parametrize("streaming", [False, True])
def test_the_columns_to_train_on_and_to_evaluate_are_named(tmp_path, streaming):
    names = write_several_columns(tmp_path)
    (tmp_path / "test-0.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes())
    columns = as_words({"dataset": tmp_path, "image_column_name": "picture", "label_column_name": "coarse"})
    words = options(
        preset="vitae-nano",
        output_dir=tmp_path / "out",
        streaming=streaming,
        max_steps=1,
        per_device_train_batch_size=3,
    )
    record = train.main([*words, *columns])
    model = ViTAEForImageClassification.from_pretrained(record["model"])
    assert list(model.config.id2label.values()) == names["coarse"]
    again = evaluate.main([*columns, *as_words({"model_name_or_path": record["model"], "output": tmp_path / "e"})])
    assert (again["images"], again["split"]) == (3, "test")
    assert again["top1_percent"] == pytest.approx(record["top1_percent"], abs=1e-3)


@pytest.mark.slow
def test_make_train_smoke_goes_the_whole_path(tmp_path):
    command = ["make", "-o", ".venv/installed", "train-smoke", f"RUN={sys.executable}", f"SMOKE={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pretrained, tuned, evaluated = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"'))
    assert pretrained["learning_rate"] == pytest.approx(1e-3 * 32 / 512)
    assert evaluated["image_size"] == [96, 96] and evaluated["images"] == 1000
    for figure in ("top1_percent", "top5_percent"):
        assert evaluated[figure] == tuned[figure]  # the Trainer's evaluation and the script's


def parsed(task, tmp_path, *words, **recipe):
    """A task with the arguments of a recipe and of a command line."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    common = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", "x", "--output_dir", str(tmp_path / "out")]
    return task.parse([*common, "--report_to", "none", *words])


def test_a_recipes_values_are_checked_as_those_of_a_command_line(tmp_path):
    detection = parsed(Detection, tmp_path, preset="vitae-nano", image_size=640, short_sides=800, lr_steps=[8, 11])
    assert (detection.augmentation.image_size, detection.augmentation.short_sides) == ([640], [800])
    assert detection.run.lr_steps == [8.0, 11.0]
    assert parsed(Detection, tmp_path, preset="vitae-nano", save_strategy=False).training.save_strategy == "no"
    for name, value, message in (
        ("detector", "retinanet", "detector must be one of rt_detr, .*, got 'retinanet'"),
        ("box_format", "XYXY", "box_format must be one of xywh, xyxy, got 'XYXY'"),
        ("on_bad_object", "ignore", "on_bad_object must be one of error, skip"),
        ("lr_steps", ["soon"], "lr_steps must be of type float, got 'soon'"),
    ):
        with pytest.raises(ValueError, match=f"recipe.yaml: {message}"):
            parsed(Detection, tmp_path, **{"preset": "vitae-nano", name: value})


def test_a_command_line_may_begin_with_another_network_than_the_recipe(tmp_path):
    run = parsed(Classification, tmp_path, "--model_name_or_path", "trained", preset="vitae-t").run
    assert (run.preset, run.model_name_or_path) == (None, "trained")
    run = parsed(Classification, tmp_path, "--preset", "vitae-s", model_name_or_path="trained").run
    assert (run.preset, run.model_name_or_path) == ("vitae-s", None)
    with pytest.raises(ValueError, match="give either --preset"):
        parsed(Classification, tmp_path, "--preset", "vitae-s", "--model_name_or_path", "trained")


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            Classification,
            ["--lr_scheduler_type", "linear"],
            "--lr_scheduler_type has no effect in `vitae train`: the sch",
        ),
        (Segmentation, ["--min_learning_rate", "0"], "--min_learning_rate has no effect in `vitae segment`"),
        (Detection, ["--cooldown_epochs", "1"], "--cooldown_epochs has no effect in `vitae detect`"),
        (Segmentation, ["--prediction_loss_only", "true"], "--prediction_loss_only leaves out the mean IoU"),
        (
            Segmentation,
            ["--metric_for_best_model", "miou"],
            "--metric_for_best_model must be one of mean_iou, pixel_acc",
        ),
        (
            Detection,
            ["--metric_for_best_model", "mask_map"],
            "must be one of map, map_50, map_75, mar_100; got 'mask_map'",
        ),
        (Pretraining, ["--metric_for_best_model", "accuracy"], "must be one of loss; got 'accuracy'"),
        (Classification, ["--base_ema_decay", "1.2"], "`base_ema_decay` must be at least 0 and below 1, got 1.2"),
        (Classification, ["--base_learning_rate", "-1"], "`base_learning_rate` must be at least 0, got -1.0"),
        (Classification, ["--num_train_epochs", "0"], "`num_train_epochs` must be above 0, got 0.0"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused_before_data_are_read(tmp_path, task, words, message):
    with pytest.raises(ValueError, match=message):
        parsed(task, tmp_path, *words, preset="vitae-nano")


def test_an_average_is_turned_off_by_either_of_its_numbers(tmp_path):
    for word in ("--ema_decay", "--base_ema_decay"):
        assert (
            parsed(Classification, tmp_path, word, "0", preset="vitae-nano", ema_decay=0.9).training.ema_decay is None
        )
    assert (
        parsed(Classification, tmp_path, "--auto_augment", "none", preset="vitae-nano").augmentation.auto_augment
        is None
    )


@pytest.mark.parametrize("task", [Classification, Pretraining, Segmentation, Detection])
def test_every_argument_of_ours_says_what_it_is_for(task, capsys):
    library = {field.name for field in dataclasses.fields(TrainingArguments)}
    for group in dataclasses.fields(task):
        for argument in dataclasses.fields(group.type):
            assert argument.name in library or argument.metadata.get("help"), argument.name


def test_classes_in_another_order_keep_their_rows(tmp_path, caplog):
    """As folders give them, in alphabetical order."""
    trained = ViTAEForImageClassification.from_pretrained(find_model("vitae-nano-fashion"))
    names = dict(enumerate(sorted(trained.config.id2label.values())))
    task = parsed(Classification, tmp_path, model_name_or_path="vitae-nano-fashion")
    model = task.build_model(names)
    for number, name in names.items():
        before = trained.config.label2id[name]
        assert torch.equal(model.classifier.weight[number], trained.classifier.weight[before])
        assert model.classifier.bias[number] == trained.classifier.bias[before]
    assert not caplog.messages
    model = task.build_model({number: f"other {number}" for number in range(10)})
    assert torch.equal(model.classifier.weight, trained.classifier.weight)
    assert "trained for as many other classes, T-shirt" in caplog.text


def test_a_run_goes_on_with_as_many_images_as_it_began_with(tmp_path):
    write_class_folders(tmp_path / "in", ["a", "b"])
    words = {"dataset": tmp_path / "in", "preset": "vitae-nano", "image_size": 32, "output_dir": tmp_path / "out"}
    arguments = options(**words, max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none")
    train.main(arguments)
    (picture, *_) = (tmp_path / "in").rglob("*.png")
    for number in range(20):
        shutil.copy(picture, picture.with_name(f"more {number}.png"))
    with pytest.raises(ValueError, match=r"checkpoint-2 is of a run on [\d,]+ training images, where there now are"):
        train.main([*arguments, "--resume_from_checkpoint", "last"])
