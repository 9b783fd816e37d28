"""Training with the library's Trainer: exact resume, and the recipe's parameter groups."""

import pytest
import torch
from helpers import images, pyramid_config
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

from vitae_hf import ViTAEForImageClassification
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.optimization import cosine_factor
from vitae_hf.training.trainer import ViTAETrainer


def dataset(count: int = 24) -> list[dict]:
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images(count))]


def train(config, folder, resume: bool = False, trainer_class=Trainer, **overrides):
    """The trainer after six steps with every random thing on, shuffling too, and a checkpoint after three of them."""
    arguments = {
        "output_dir": folder,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    set_seed(4 if resume else 3)  # a resumed model must take everything from its checkpoint
    model = AutoModelForImageClassification.from_config(config)
    arguments_class = ViTAETrainingArguments if trainer_class is ViTAETrainer else TrainingArguments
    trainer = trainer_class(model, arguments_class(**{**arguments, **overrides}), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny_config, tmp_path, overrides):
    config = tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.2)
    uninterrupted = train(config, tmp_path, **overrides).model.state_dict()
    resumed = train(config, tmp_path, resume=True, **overrides).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_the_trainer_gives_no_bias_and_no_norm_weight_decay(tiny_config, tmp_path):
    """It goes by names, so a BatchNorm that is not called a norm would decay."""
    model = AutoModelForImageClassification.from_config(tiny_config())
    trainer = Trainer(model, TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model))
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.Linear, nn.Conv2d)):
            assert f"{module_name}.bias" not in decayed
            assert (f"{module_name}.weight" in decayed) == isinstance(module, (nn.Linear, nn.Conv2d))


def test_one_batch_is_learned_by_heart(tiny_config, tmp_path):
    config = tiny_config(drop_path_rate=0.0, reduction_dropout_prob=0.0)
    model = train(config, tmp_path, max_steps=60, save_strategy="no", per_device_train_batch_size=24).model
    predictions = model(images(24)).logits.argmax(-1)  # in training mode, with the batch's own statistics
    assert (predictions == torch.arange(24) % 5).float().mean() > 0.9


# ------------------------------------------------------------------------------------- the recipe's own trainer

RECIPE = {
    "trainer_class": ViTAETrainer,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup_steps": 2,
    "layer_decay": 0.8,
    "ema_decay": 0.9,
    "ema_warmup": True,
}


def test_the_recipes_trainer_resumes_exactly_with_its_average(tiny_config, tmp_path):
    config = tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.2)
    uninterrupted = train(config, tmp_path, **RECIPE)
    resumed = train(config, tmp_path, resume=True, **RECIPE)
    for ours, theirs in ((uninterrupted.model, resumed.model), (uninterrupted.averaged_model, resumed.averaged_model)):
        state = theirs.state_dict()
        assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    assert uninterrupted.state.log_history[-1]["train_loss"] > 0
    assert not torch.equal(uninterrupted.averaged_model.classifier.weight, uninterrupted.model.classifier.weight)


def test_the_average_equals_a_plain_loop(tmp_path):
    """Parameters and statistics, against a running sum of what the model was after each update."""
    history = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            history.append({name: value.clone().double() for name, value in model.state_dict().items()})

    set_seed(0)
    model = ViTAEForImageClassification(pyramid_config())
    start = {name: value.clone().double() for name, value in model.state_dict().items()}
    arguments = ViTAETrainingArguments(
        tmp_path,
        max_steps=5,
        ema_decay=0.7,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = ViTAETrainer(model, arguments, train_dataset=dataset(), callbacks=[Record()])
    trainer.train()
    for name, value in trainer.averaged_model.state_dict().items():
        expected = start[name]
        for step, state in enumerate(history, start=1):
            decay = 0.7 if step > 1 else 0.0  # the first update takes the weights as they are, as timm has it
            expected = decay * expected + (1 - decay) * state[name]
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected, atol=1e-6), name


def test_the_average_is_evaluated_and_saved_as_a_model(tmp_path):
    trainer = train(pyramid_config(), tmp_path, **RECIPE)
    with torch.no_grad():
        expected = trainer.averaged_model.eval()(images(24)).logits
    assert torch.allclose(torch.from_numpy(trainer.predict(dataset()).predictions), expected, atol=1e-5)
    trainer.save_model()
    averaged = ViTAEForImageClassification.from_pretrained(tmp_path / "ema").eval()
    trained = ViTAEForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(averaged.classifier.weight, trainer.averaged_model.classifier.weight)
    assert torch.equal(trained.classifier.weight, trainer.model.classifier.weight)


def test_the_schedule_warms_up_and_cools_down_at_the_floor(tmp_path):
    logs = train(
        pyramid_config(),
        tmp_path,
        **{**RECIPE, "max_steps": -1, "num_train_epochs": 4, "cooldown_epochs": 1, "layer_decay": 1.0},
        logging_steps=1,
        save_strategy="no",
    ).state.log_history
    rates = [entry["learning_rate"] for entry in logs if "learning_rate" in entry]
    assert len(rates) == 24 and rates[0] == pytest.approx(1e-6) and rates[2] == pytest.approx(max(rates))
    assert rates[18:] == pytest.approx([1e-5] * 6) and rates[17] > 1e-5


def test_augmentation_touches_training_batches_and_not_evaluation(tmp_path):
    """uint8 pictures are normalised and mixed while the model trains; evaluation data come normalised already."""
    seen = []
    model = ViTAEForImageClassification(pyramid_config())
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((model.training, kwargs["pixel_values"])), with_kwargs=True
    )
    pictures = [
        {"pixel_values": (image * 40 + 128).clamp(0, 255).to(torch.uint8), "labels": i % 5}
        for i, image in enumerate(images(8))
    ]
    arguments = ViTAETrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = ViTAETrainer(
        model,
        arguments,
        train_dataset=pictures,
        eval_dataset=dataset(8),
        augmentation=DeviceAugmentation(5, AugmentationArguments()),
        compute_loss_func=soft_target_loss,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    training = [pixels for is_training, pixels in seen if is_training]
    assert len(training) == 2 and all(pixels.is_floating_point() and pixels.min() < 0 for pixels in training)
    assert torch.equal(torch.cat([pixels for is_training, pixels in seen if not is_training]), images(8))


def test_resuming_without_the_average_says_so(tmp_path):
    train(pyramid_config(), tmp_path, **{**RECIPE, "ema_decay": None})
    with pytest.raises(FileNotFoundError, match="cannot resume the average of the weights: there is no .*ema"):
        train(pyramid_config(), tmp_path, resume=True, **RECIPE)


@pytest.mark.parametrize(
    "options, message", [({"ema_decay": 1.0}, "`ema_decay`"), ({"cooldown_epochs": 3}, "`cooldown_epochs`")]
)
def test_wrong_recipe_values_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ViTAETrainingArguments(tmp_path, **options)


def test_the_full_learning_rate_is_logged_under_layer_decay(tmp_path):
    trainer = train(pyramid_config(), tmp_path, **RECIPE, logging_steps=1, save_strategy="no")
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    shape = {"steps": 6, "warmup_steps": 2, "warmup_factor": 1e-6 / 2e-3, "floor_factor": 1e-5 / 2e-3}
    assert logged == pytest.approx([2e-3 * cosine_factor(step, **shape) for step in range(6)])
    assert trainer.throughput.images_per_s > 0


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ViTAETrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process cannot train on 2 GPUs: start `torchrun --nproc_per_node 2`"):
        ViTAETrainingArguments(tmp_path, use_cpu=True)
