"""`vitae pretrain` of variants without a class token: masked image models, from pictures to what is fine-tuned."""

import json

import pytest
import torch
import yaml
from datasets import load_dataset
from helpers import DATA, as_words, drawn, images
from huggingface_hub import ModelCard

from vitae_hf import ViTAEForImageClassification, ViTAEForMaskedImageModeling, ViTAEv2ForMaskedImageModeling
from vitae_hf.commands import pretrain, train
from vitae_hf.commands.pretrain import Pretraining
from vitae_hf.files import RECIPES


def options(**values) -> list[str]:
    common = {"dataloader_drop_last": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return as_words({"preset": "vitae-nano", "mask_patch_size": 16, **common, **values})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 160 real images without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = load_dataset("parquet", data_files=str(DATA / "train-*.parquet"), split="train[:160]")
    for index, row in enumerate(rows):
        row["image"].save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(pictures, tmp_path_factory):
    """What the command leaves and its record, after 40 updates."""
    folder = tmp_path_factory.mktemp("mim")
    rate = {"learning_rate": 3e-3, "max_steps": 40, "per_device_train_batch_size": 16}
    evaluation = {"eval_share": 0.1, "eval_strategy": "steps", "eval_steps": 20, "eval_on_start": True, "pictures": 3}
    record = pretrain.main(options(dataset=pictures, output_dir=folder, **rate, **evaluation))
    return folder, record


def test_the_loss_falls_on_real_images_without_labels(pretrained):
    folder, record = pretrained
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] < 0.75 * losses[0]
    assert losses[-1] == pytest.approx(record["eval_loss"], abs=1e-4) and record["eval_split"] == "held_out"


@pytest.mark.slow
def test_the_loss_of_vitaev2_falls_too(pictures, tmp_path):
    rate = {"learning_rate": 3e-3, "max_steps": 60, "per_device_train_batch_size": 16, "preset": "vitaev2-nano"}
    evaluation = {"eval_share": 0.1, "eval_on_start": True, "eval_strategy": "no"}
    record = pretrain.main(options(dataset=pictures, output_dir=tmp_path, **rate, **evaluation))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert record["eval_loss"] < 0.8 * before


def test_pictures_and_a_card_are_written(pretrained):
    folder, record = pretrained
    drawings = sorted((folder / "reconstructions").iterdir())
    assert [path.stem for path in drawings] == ["step-000000", "step-000020", "step-000040"]
    assert record["picture"] == str(drawings[-1]) and drawn(drawings[0]) != drawn(drawings[-1])
    card = ModelCard.load(folder / "README.md")
    assert "masked-image-modeling" in card.data.tags and f"{record['eval_loss']:.4f}" in card.text
    assert "masked image model" in card.text and "16×16, 60% of each image" in card.text and "kernels" not in card.text


def trainer_of(pictures, folder, **values):
    return Pretraining.parse(options(dataset=pictures, output_dir=folder, **values)).build_trainer()


def test_masks_are_whole_squares_at_random_of_the_share_that_is_asked_for(pictures, tmp_path):
    trainer = trainer_of(pictures, tmp_path, mask_patch_size=8, mask_ratio=0.7)
    pixel_values = images(40)
    assert trainer.model.config.patch_size == 4
    masked = trainer.masked_positions(pixel_values, trainer.draw_noise(pixel_values))
    squares = masked.view(40, 8, 2, 8, 2)
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))
    assert (masked.float().mean(1) == 45 / 64).all()  # at least 70 %
    assert masked.unique(dim=0).shape[0] == 40 and (masked.float().mean(0) - 0.7).abs().max() < 0.3


def test_a_picture_shows_visible_patches_as_they_are_and_predictions_elsewhere(pictures, tmp_path):
    trainer = trainer_of(pictures, tmp_path)
    model, pixel_values = trainer.model.eval(), images(2)
    noise = trainer.draw_noise(pixel_values)
    blank, pasted = trainer.reconstruct(model, pixel_values, noise)
    masked = trainer.masked_positions(pixel_values, noise)
    outputs, is_masked = model(pixel_values, bool_masked_pos=masked), blank.isnan()
    assert torch.equal(is_masked, model.masked_pixels(masked, pixel_values).expand_as(blank))
    assert torch.equal(blank[~is_masked], pixel_values[~is_masked])
    assert torch.equal(pasted, torch.where(is_masked, outputs.reconstruction, pixel_values))
    assert (pasted - pixel_values)[is_masked].abs().mean().item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_a_resumed_run_draws_the_masks_that_it_would_have_drawn(pictures, tmp_path):
    common = {"dataset": pictures, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    common |= {"eval_strategy": "no", "pictures": 1, "eval_share": 0.05, "max_steps": 4}
    whole = pretrain.main(options(**common, output_dir=tmp_path / "whole"))
    again = options(**common, output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert pretrain.main(again)["eval_loss"] == whole["eval_loss"]
    weights = [ViTAEForMaskedImageModeling.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_it_is_fine_tuned_by_the_training_command(pretrained, tmp_path):
    folder, _ = pretrained
    words = {
        "dataset": DATA,
        "train_share": 0.01,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "layer_decay": 0.75,
    }
    words |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-9}
    train.main(as_words({**words, "model_name_or_path": folder, "output_dir": tmp_path}))
    tuned = ViTAEForImageClassification.from_pretrained(tmp_path).state_dict()
    encoder = ViTAEForMaskedImageModeling.from_pretrained(folder).vitae.state_dict()
    assert all(
        torch.allclose(tuned[f"vitae.{name}"], weight, atol=1e-6)
        for name, weight in encoder.items()
        if "running" not in name and "num_batches" not in name
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mask_patch_size": 24}, "must divide the side of the images, 64, and be a multiple of 4, .*; got 24"),
        ({"mask_patch_size": 2}, "must divide the side of the images, 64, and be a multiple of 4, .*; got 2"),
        ({"mask_patch_size": 0}, "got 0"),
        ({"mask_patch_size": 64}, "`mask_ratio` 0.6 leaves 0 of 1 patches visible"),
        ({"mask_ratio": 1.5}, "`mask_ratio` 1.5 leaves"),
        ({"norm_pix_loss": True}, "--norm_pix_loss does not go with vitae-nano: .* predicts pixels as they are"),
        ({"preset": "vitae-nano-mae"}, "--mask_patch_size does not go with vitae-nano-mae: .* of 8 pixels"),
    ],
)
def test_masks_that_cannot_be_are_refused_before_data_are_read(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        Pretraining.parse(options(dataset="no/such", output_dir=tmp_path, **values))


def test_the_recipe_has_simmims_numbers(tmp_path):
    path = RECIPES / "mim-vitaev2-s.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    task = Pretraining.parse(as_words({"config": path, "dataset": "x", "output_dir": tmp_path, "report_to": "none"}))
    values = {**vars(task.run), **vars(task.training)}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy"}
    devices = 2048 // task.training.per_device_train_batch_size
    assert task.training.learning_rate * devices == pytest.approx(8e-4)


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    tiny = {"preset": "vitaev2-nano", "image_size": 64, "max_steps": 2, "per_device_train_batch_size": 8}
    tiny |= {"dataloader_num_workers": 0, "save_strategy": "no", "eval_strategy": "no", "crop_pct": 1}
    words = {"config": "mim-vitaev2-s", "dataset": DATA, "output_dir": tmp_path, "report_to": "none", **tiny}
    record = pretrain.main([*as_words(words), "--eval_split", "test"])
    assert ViTAEv2ForMaskedImageModeling.from_pretrained(record["model"]).config.image_size == 64
