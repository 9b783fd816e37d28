"""vitae segment: from scenes to a folder that segments, resumed exactly, by recipes that are read whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from dense_networks import SCENES
from helpers import ASSETS, IMAGE, as_words, drawn, last_line, pyramid_config, rotated_config, run
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation, pipeline

from vitae_hf import ViTAEForImageClassification
from vitae_hf.commands import evaluate
from vitae_hf.commands import segment as segment_command
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.data import SegmentationDataset, load_masked_images, mask_class_names
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.evaluation.colours import class_colours
from vitae_hf.evaluation.detections import segment
from vitae_hf.evaluation.metrics import MeanIoU
from vitae_hf.evaluation.windows import Windows
from vitae_hf.files import RECIPES
from vitae_hf.hub.publishing import check_folder
from vitae_hf.loading import segmentation_processor


def options(output, **values) -> list[str]:
    common = {"dataset": SCENES, "short_side": 96, "crop_size": 96, "report_to": "none", "save_strategy": "no"}
    common |= {"head_channels": 16, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 20}
    return as_words({**common, "output_dir": output, **values})


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """Four of the shipped scenes as both splits of a data set."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = datasets.load_dataset(str(SCENES), split="validation").select(range(4))
    for split in ("train", "validation"):
        scenes.to_parquet(folder / f"{split}-0.parquet")
    return folder


@pytest.mark.slow
def test_the_script_learns_saves_draws_and_its_folder_segments(few_scenes, tmp_path):
    """It learns four scenes by heart; what it makes of new ones takes minutes, see the slow test."""
    learning = {"learning_rate": 1e-2, "warmup_steps": 5, "min_scale": 1, "max_scale": 1, "distortion_prob": 0}
    learning |= {"max_steps": 80, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    learning |= {"short_side": 64, "crop_size": 64}
    done = run("segment", *options(tmp_path, preset="vitae-nano", dataset=few_scenes, **learning))
    record = last_line(done)
    assert record["mean_iou_percent"] > 3 * record["constant_mean_iou_percent"]
    figures = json.loads((tmp_path / "segmentation_metrics.json").read_text())
    assert record["mean_iou_percent"] == round(figures["mean_iou"], 2) and len(figures["iou"]) == 11
    assert {"overlays.png", "training_curves.png", "eval_results.json"} <= {path.name for path in tmp_path.iterdir()}
    legend = {tuple(colour) for colour in (255 * class_colours(11)[1:]).round().astype(int).tolist()}
    assert len(legend & drawn(tmp_path / "overlays.png")[1]) > 1  # garments in the masks, as the legend names them
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == round(figures["mean_iou"], 3)
    assert "| Ankle boot |" in card.text and "4 pictures" in card.text

    picture = PIL.Image.open(ASSETS / "chelsea.png").resize((131, 77))
    found = pipeline("image-segmentation", model=str(tmp_path))(picture)
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    classes = segment(model, AutoImageProcessor.from_pretrained(tmp_path), picture)
    for entry in found:
        assert np.array_equal(np.array(entry["mask"]) > 0, classes == model.config.label2id[entry["label"]])
    assert sum((np.array(entry["mask"]) > 0).sum() for entry in found) == 131 * 77


@pytest.mark.slow
def test_a_sixth_of_the_segmentation_demo_tells_garments_apart(tmp_path):
    """Twice as well as calling everything background, which is what far fewer updates come to."""
    config = RECIPES / "upernet-garment-scenes.yaml"
    record = last_line(run("segment", *options(tmp_path, config=config, head_channels=64, max_steps=500)))
    assert record["mean_iou_percent"] > 2 * record["constant_mean_iou_percent"]


def test_the_script_resumes_exactly_and_averages_weights(few_scenes, tmp_path):
    common = {"preset": "vitae-nano", "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "crop_size": 32}
    common |= {"ema_decay": 0.5, "overlays": 1, "drop_path_rate": 0.1, "dataset": few_scenes}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "short_side": 48}
    record = segment_command.main(options(tmp_path, **common))
    whole = UperNetForSemanticSegmentation.from_pretrained(record["model"]).state_dict()
    files, outputs = check_folder(Path(record["model"]), IMAGE)  # can be published, with the code of its backbone
    assert {"heads_vitae.py", "overlays.png"} <= {path.name for path in files} and outputs.isfinite().all()
    with pytest.raises(ValueError, match="checkpoint-4 is of an earlier run"):
        segment_command.main(options(tmp_path, **common))
    resumed = segment_command.main(options(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **common))
    weights = UperNetForSemanticSegmentation.from_pretrained(resumed["model"]).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())


@pytest.mark.parametrize("path", sorted((RECIPES).glob("upernet-*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_made_of_arguments_and_say_what_to_expect(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    given = [] if "preset" in recipe else ["--dataset", "x", "--model_name_or_path", "y"]
    parsed = segment_command.Segmentation.parse(["--config", str(path), "--output_dir", str(tmp_path), *given])
    values = {name: value for part in vars(parsed).values() for name, value in vars(part).items()}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy", "lr_scheduler_type", "report_to"}  # enumerations, a list


@pytest.mark.parametrize("name", ["upernet-vitae-b-rvsa-loveda", "upernet-vitae-b-rvsa-potsdam"])
def test_a_recipe_with_rotated_windows_runs(few_scenes, tmp_path, name):
    """Its own steps, of a network with four narrow cells and small crops."""
    config = rotated_config(depths=(4,), global_attn_indexes=(1, 3))
    ViTAEForImageClassification(config).save_pretrained(tmp_path / "model")
    small = {"config": name, "model_name_or_path": tmp_path / "model", "dataset": few_scenes, "max_steps": 2}
    small |= {"warmup_steps": 1, "eval_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    words = options(tmp_path / "out", **small, dataloader_num_workers=0)
    record = segment_command.main([*words, "--rescaled_cells", "0", "1", "2", "3"])
    model = UperNetForSemanticSegmentation.from_pretrained(record["model"])
    assert model.backbone.config.rescaled_cells == (0, 1, 2, 3) and model.backbone.config.drop_path_rate == 0.1


def test_cells_for_maps_are_refused_where_there_are_stages(few_scenes, tmp_path):
    words = options(tmp_path, preset="vitaev2-nano", dataset=few_scenes)
    with pytest.raises(ValueError, match="rescaled_cells is for the plain variants, such as vitae-b-rvsa"):
        segment_command.main([*words, "--rescaled_cells", "0", "1", "2", "3"])


@pytest.mark.parametrize("name, what", [("image", "images"), ("mask", "masks")])
def test_a_column_that_is_named_must_be_there(few_scenes, tmp_path, name, what):
    words = options(tmp_path, preset="vitae-nano", dataset=few_scenes, **{f"{name}_column_name": "other"})
    with pytest.raises(ValueError, match=f"has no {what} in a column 'other'"):
        segment_command.main(words)


def test_a_model_to_begin_with_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="either --preset, to train from scratch, or --model_name_or_path"):
        segment_command.Segmentation.parse(["--dataset", "x", "--output_dir", str(tmp_path)])


@pytest.fixture(scope="module")
def segmenter(few_scenes, tmp_path_factory):
    """A folder with a network that has not learned anything, and the names of its classes."""
    folder = tmp_path_factory.mktemp("segmenter")
    names = mask_class_names(load_masked_images(str(few_scenes)))
    torch.manual_seed(0)  # some random networks see one class everywhere, in windows too
    new_segmenter(dense_config(pyramid_config()), names, 16).save_pretrained(folder)
    segmentation_processor(48).save_pretrained(folder)
    return folder, list(names.values())


def evaluated(segmenter, output, **values) -> dict:
    common = {"model_name_or_path": segmenter[0], "output": output}
    return evaluate.main(as_words({**common, **values}))


def test_a_segmenter_is_evaluated_as_its_pipeline_sees_pictures(few_scenes, segmenter, tmp_path):
    record = evaluated(segmenter, tmp_path, dataset=few_scenes)
    segments, metric = pipeline("image-segmentation", model=str(segmenter[0])), MeanIoU(segmenter[1])
    for row in datasets.load_dataset(str(few_scenes), split="validation"):
        mask = np.array(row["mask"])
        predicted = np.full_like(mask, 255)
        for entry in segments(row["image"]):
            predicted[np.array(entry["mask"]) > 0] = segmenter[1].index(entry["label"])
        metric.add_batch(predictions=predicted, references=mask)
    figures = metric.compute()
    assert record["mean_iou_percent"] == round(figures["mean_iou"], 4) and record["split"] == "validation"
    written = json.loads((tmp_path / "eval_metrics.json").read_text())
    assert written["iou_percent"] == figures["iou"] and (tmp_path / "overlays.png").stat().st_size > 10_000
    window = evaluated(segmenter, tmp_path, dataset=few_scenes, short_side=48, window_size=64)  # all of a picture
    assert window["mean_iou_percent"] == record["mean_iou_percent"] and window["window_stride"] == 48
    windows = evaluated(segmenter, tmp_path, dataset=few_scenes, window_size=32, window_stride=16)
    assert windows["mean_iou_percent"] != record["mean_iou_percent"]


def test_masks_whose_classes_have_other_numbers_give_the_same_figures(few_scenes, segmenter, tmp_path):
    """As the numbers of a file of names, and with 0 for none of the classes."""
    expected = evaluated(segmenter, tmp_path / "expected", dataset=few_scenes)
    names, folder, rows = segmenter[1], tmp_path / "data" / "validation", []
    folder.mkdir(parents=True)
    for index, row in enumerate(datasets.load_dataset(str(few_scenes), split="validation")):
        mask = np.array(row["mask"])
        row["image"].save(folder / f"{index}.png")
        PIL.Image.fromarray(np.where(mask == 255, 0, len(names) - mask).astype(np.uint8)).save(folder / f"{index}m.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "mask_file_name": f"{index}m.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "names.txt").write_text("\n".join(reversed(names)))
    words = {"model_name_or_path": segmenter[0], "dataset": tmp_path / "data", "class_names": tmp_path / "names.txt"}
    words = [*as_words({**words, "output": tmp_path / "reversed"}), "--reduce_labels"]
    assert evaluate.main(words)["mean_iou_percent"] == expected["mean_iou_percent"]
    with pytest.raises(ValueError, match="no class: there are 11 classes"):  # the first is 11 of them
        evaluate.main([*words, "--no-reduce_labels"])
    ignored = evaluate.main([*words, "--ignored_class", str(len(names) - 1)])  # the first: the background
    pixels = json.loads((tmp_path / "reversed" / "eval_metrics.json").read_text())["pixels"]
    assert pixels[names[0]] == 0 and any(pixels.values())
    assert ignored["pixel_accuracy_percent"] != expected["pixel_accuracy_percent"]


def test_arguments_of_another_kind_of_model_are_refused(few_scenes, segmenter, tmp_path):
    for words, message in [
        ({"short_side": 0}, "--short_side must be at least 1, got 0"),
        ({"ignored_class": 255}, "the ignored class must be from 0 to 254, got 255"),
        ({"batch_size": 2}, r"--batch_size goes with a classifier; .* is a segmenter"),
        ({"window_stride": 8}, "--window_stride takes a --window_size too"),
        ({"image_column_name": "photo"}, "has no images in a column 'photo'"),
        ({"mask_column_name": "map"}, "has no masks in a column 'map'"),
        ({"window_size": 8, "window_stride": 9}, "at least 1 pixel apart and at most their size; got 9 for 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluated(segmenter, tmp_path, dataset=few_scenes, **words)
    classifier = {"model_name_or_path": "vitae-nano-fashion", "dataset": few_scenes, "output": tmp_path}
    with pytest.raises(ValueError, match="--window_size goes with a segmenter; vitae-nano-fashion is a classifier"):
        evaluate.main(as_words({**classifier, "window_size": 8}))


@pytest.mark.parametrize("height, width", [(11, 7), (3, 9), (4, 4)])
def test_a_pixels_logits_are_the_mean_over_the_windows_that_it_is_in(height, width):
    class Reader(torch.nn.Module):
        """Its logits are the pixels, more in windows with larger ones."""

        config = SimpleNamespace(num_labels=3)

        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values * pixel_values.amax((1, 2, 3), keepdim=True))

    pixels = torch.rand(2, 3, height, width)
    logits = Windows(4, 3).outputs(Reader(), pixels).logits
    places = [[min(start, max(length - 4, 0)) for start in range(0, length, 3)] for length in (height, width)]
    for y, x in np.ndindex(height, width):
        corners = {(i, j) for i in places[0] for j in places[1] if i <= y < i + 4 and j <= x < j + 4}
        largest = [pixels[:, :, i : i + 4, j : j + 4].amax((1, 2, 3)) for i, j in corners]
        torch.testing.assert_close(logits[:, :, y, x], pixels[:, :, y, x] * torch.stack(largest).mean(0)[:, None])


def test_255_for_the_second_class_is_seen_whatever_the_numbers_of_a_model(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:] = 255
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    PIL.Image.fromarray(mask).save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "mask_file_name": "m.png"}))
    split = load_masked_images(str(tmp_path))["train"]
    for classes in (None, np.array([1, 0])):
        with pytest.raises(ValueError, match="the masks have the values 0 and 255 alone"):
            SegmentationDataset(split, None, 2, classes=classes).check()
