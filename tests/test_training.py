"""Training with the library's Trainer: exact resume, and the recipe's parameter groups."""

import pytest
import torch
from conftest import images
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from vitae_hf import ViTAEForImageClassification


def dataset(count: int = 24) -> list[dict]:
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images(count))]


def train(config, folder, resume: bool = False, **overrides) -> ViTAEForImageClassification:
    """Six steps with every random thing on: shuffling, dropout, drop path; a checkpoint after three of them."""
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
    model = ViTAEForImageClassification(config)
    trainer = Trainer(model, TrainingArguments(**{**arguments, **overrides}), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model


@pytest.mark.parametrize("overrides", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny_config, tmp_path, overrides):
    config = tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.2)
    uninterrupted = train(config, tmp_path, **overrides).state_dict()
    resumed = train(config, tmp_path, resume=True, **overrides).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_the_trainer_gives_no_bias_and_no_norm_weight_decay(tiny_config, tmp_path):
    """It goes by names, so a BatchNorm that is not called a norm would decay."""
    model = ViTAEForImageClassification(tiny_config())
    trainer = Trainer(model, TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model))
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.Linear, nn.Conv2d)):
            assert f"{module_name}.bias" not in decayed
            assert (f"{module_name}.weight" in decayed) == isinstance(module, (nn.Linear, nn.Conv2d))


def test_one_batch_is_learned_by_heart(tiny_config, tmp_path):
    config = tiny_config(drop_path_rate=0.0, reduction_dropout_prob=0.0)
    model = train(config, tmp_path, max_steps=60, save_strategy="no", per_device_train_batch_size=24)
    predictions = model(images(24)).logits.argmax(-1)  # in training mode, with the batch's own statistics
    assert (predictions == torch.arange(24) % 5).float().mean() > 0.9
