"""What each of two processes does for test_distributed.py: `torchrun --nproc_per_node 2 distributed_worker.py FOLDER`.

Every job leaves what it found in `FOLDER/<job>-<rank>.pt`. Some run in one process too, for comparison.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import images, pyramid_config, write_parquet
from transformers import EvalPrediction, set_seed

from vitae_hf import ViTAEForImageClassification
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss
from vitae_hf.data.samples import IGNORED_LABEL, collate
from vitae_hf.data.shards import StreamedImageDataset, find_shards
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.trainer import ViTAETrainer


EVALUATED, UNREADABLE = 21, 6
GLOBAL_BATCH = 8


def samples(count: int) -> list[dict]:
    return [{"pixel_values": image, "labels": index % 5, "names": index} for index, image in enumerate(images(count))]


def evaluation_samples() -> list[dict]:
    """Not divisible by two processes, and with one picture that could not be read."""
    blank = {"pixel_values": torch.zeros(3, 64, 64), "labels": IGNORED_LABEL, "names": None}
    return [blank if index == UNREADABLE else sample for index, sample in enumerate(samples(EVALUATED))]


def score(result: EvalPrediction) -> dict[str, float]:
    rated = result.label_ids != IGNORED_LABEL
    return {"images": int(rated.sum()), "logit_sum": float(result.predictions[rated].sum())}


def build_trainer(
    folder: Path, train_dataset=None, augmentation=None, config=None, cls=ViTAETrainer, **options
) -> ViTAETrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
    }
    set_seed(0)
    config = config or pyramid_config(drop_path_rate=0.0, reduction_dropout_prob=0.0)
    return cls(
        ViTAEForImageClassification(config),
        ViTAETrainingArguments(folder, **{**defaults, **options}),
        train_dataset=train_dataset or samples(24),
        eval_dataset=evaluation_samples(),
        data_collator=collate,
        compute_loss_func=soft_target_loss,
        compute_metrics=score,
        augmentation=augmentation,
    )


def losses(trainer: ViTAETrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def whole_run(folder: Path, resume_from: Path | None = None, **options) -> dict:
    """Frozen statistics and nothing random, so that the number of processes must not matter."""
    trainer = build_trainer(folder, frozen_batch_norm=True, **options)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    found = {"losses": losses(trainer), "metrics": trainer.evaluate()}
    if trainer.averaged_model is not None:
        found |= {
            "weights": copy_of(trainer.model.state_dict()),
            "average": copy_of(trainer.averaged_model.state_dict()),
        }
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainer.save_model(folder / f"saved_by_{rank}")
    return found


def with_data_parallelism(folder: Path) -> dict:
    return whole_run(folder, ema_decay=0.9, ddp_find_unused_parameters=False)


class RecordedAugmentation(DeviceAugmentation):
    """Remembers what it drew: the mixing ratio (NumPy's) and, of pictures all alike, what is erased (torch, random)."""

    def __init__(self):
        super().__init__(5, AugmentationArguments(erasing_prob=1.0, cutmix_alpha=0.0))
        self.draws = []

    def __call__(self, pixel_values, labels):
        pixel_values, targets = super().__call__(pixel_values, labels)
        self.draws.append((targets.std(0).sum().item(), pixel_values.sum().item()))
        return pixel_values, targets


def with_random_augmentation(folder: Path, resume: bool = False) -> dict:
    """Every random thing on and live BatchNorms; a checkpoint after two of four updates."""
    augmentation = RecordedAugmentation()
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    alike = [{"pixel_values": grey, "labels": index % 2, "names": index} for index in range(32)]
    trainer = build_trainer(
        folder,
        alike,
        augmentation,
        pyramid_config(drop_path_rate=0.2, hidden_dropout_prob=0.1),
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    before = copy_of(trainer.averaged_model.state_dict())
    trainer.evaluate()
    return {
        "draws": augmentation.draws,
        "losses": losses(trainer),
        "weights": copy_of(trainer.model.state_dict()),
        "average": copy_of(trainer.averaged_model.state_dict()),
        "average_before_evaluation": before,
    }


def resumed(folder: Path) -> dict:
    return with_random_augmentation(folder.with_name("with_random_augmentation"), resume=True)


def streamed(folder: Path) -> dict:
    """Two epochs of 40 rows in shards of unequal sizes; what each process was given to train on."""
    if dist.get_rank() == 0:
        (folder / "shards").mkdir(parents=True)
        write_parquet(folder / "shards")
    dist.barrier()

    class Recording(ViTAETrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(inputs["names"])
            return super().training_step(model, inputs, num_items_in_batch)

    seen = []
    stream = StreamedImageDataset(
        find_shards(str(folder / "shards")),
        lambda picture: torch.zeros(3, 64, 64),
        GLOBAL_BATCH // 2,
        rank=dist.get_rank(),
        world_size=2,
    )
    trainer = build_trainer(folder, stream, cls=Recording, max_steps=-1, num_train_epochs=2, dataloader_num_workers=1)
    trainer.train()
    return {"names": seen, "steps": trainer.state.global_step}


def refusals(folder: Path) -> dict:
    messages = {}
    for name, options in (("cpu", {"sync_batch_norm": True}), ("fsdp", {"ema_decay": 0.9, "fsdp": True})):
        try:
            build_trainer(folder, **options)
        except ValueError as error:
            messages[name] = str(error)
        AcceleratorState._reset_state()
    return messages


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs: what it does for accelerators (accelerate/state.py), which it skips for CPUs."""
    initialise = AcceleratorState.__init__

    def initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialise_with_fsdp
    AcceleratorState._reset_state()


def with_sharded_weights(folder: Path) -> dict:
    return whole_run(folder, fsdp=True, save_strategy="steps", save_steps=2)


def resumed_with_sharded_weights(folder: Path) -> dict:
    return whole_run(folder, folder.with_name("with_sharded_weights") / "checkpoint-2", fsdp=True)


def with_sharded_weights_in_bfloat16(folder: Path) -> dict:
    AcceleratorState._reset_state()  # for another precision
    return whole_run(folder, fsdp=True, bf16=True)


def loaded_in_shards(folder: Path) -> dict:
    """Sharded by the library itself while loading."""
    from transformers.distributed import DistributedConfig

    source = folder.with_name("with_data_parallelism") / "saved_by_0"
    model = ViTAEForImageClassification.from_pretrained(
        source, distributed_config=DistributedConfig(fsdp_size=2)
    ).eval()
    sharded = sum(parameter.to_local().numel() for parameter in model.parameters())
    with torch.no_grad():
        logits = model(images(2)).logits
    model.save_pretrained(folder / "saved")
    return {"logits": logits, "sharded": sharded, "whole": sum(p.numel() for p in model.parameters())}


def main(output: Path) -> None:
    jobs = [with_data_parallelism, with_random_augmentation, resumed, streamed]
    sharding_jobs = [
        refusals,
        with_sharded_weights,
        resumed_with_sharded_weights,
        with_sharded_weights_in_bfloat16,
        loaded_in_shards,
    ]
    for job in jobs + sharding_jobs:
        if job is sharding_jobs[0]:
            shard_on_cpus()
        found = job(output / job.__name__)
        torch.save(found, output / f"{job.__name__}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
