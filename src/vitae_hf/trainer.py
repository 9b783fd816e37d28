# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The library's Trainer with the authors' optimizer settings, device augmentation and an average of the weights."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

from .augmentation import DeviceAugmentation
from .optimization import cosine_schedule, parameter_groups


@dataclass
class ViTAETrainingArguments(TrainingArguments):
    """`TrainingArguments`, and the parts of the authors' recipe that these lack.

    `learning_rate` is the full one, already scaled (`scaled_learning_rate`); `warmup_steps` is the library's: updates,
    or a share of the run if below 1. `lr_scheduler_type` is not read: the schedule is the authors'.
    """

    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a layer over that of the one above."})
    warmup_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the first update."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Floor of the cosine."})
    cooldown_epochs: float = field(
        default=0.0, metadata={"help": "The last so many of `num_train_epochs` are trained at the floor."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Lay pixels and convolutions out by channels, which convolves faster."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep an exponential moving average of the weights with this decay."}
    )
    ema_warmup: bool = field(
        default=False, metadata={"help": "Let the decay rise to `ema_decay`, for runs too short for it."}
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "BatchNorm statistics of the batches of all GPUs together, not of each."}
    )
    frozen_batch_norm: bool = field(
        default=False, metadata={"help": "Train with the BatchNorm statistics that the model came with."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data must not hang on a process's own random state
        if self.sync_batch_norm and self.frozen_batch_norm:
            raise ValueError("`sync_batch_norm` and `frozen_batch_norm` exclude each other: frozen ones use no batch")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}")
        if not 0 <= self.cooldown_epochs < self.num_train_epochs:
            raise ValueError(
                f"`cooldown_epochs` must be at least 0 and below `num_train_epochs`, {self.num_train_epochs};"
                f" got {self.cooldown_epochs}"
            )


class ViTAETrainer(Trainer):
    """A Trainer that follows [`ViTAETrainingArguments`].

    With `ema_decay`, `evaluate` and `predict` use the averaged weights once training has begun, every checkpoint and
    the saved model hold them as a complete model in their folder `ema/`, and a resumed run continues the average.
    Parameters and BatchNorm statistics are averaged alike, after each update, on the device of the model.

    With several processes each draws its own randomness (drop path, mixup, erasing), as one process would for each
    part of the batch; the weights begin equal. All evaluate with the BatchNorm statistics of the first, which saves.

    Raises:
        ValueError: `ema_decay` with FSDP, or `sync_batch_norm` with several processes on CPUs.
    """

    def __init__(self, *args, augmentation: DeviceAugmentation | None = None, **kwargs):
        """
        Args:
            augmentation: what to do to each training batch on the device, after the data loader; see there.
            args, kwargs: the library's.
        """
        super().__init__(*args, **kwargs)
        if self.args.sync_batch_norm and self.args.world_size > 1:
            if self.args.device.type == "cpu":
                raise ValueError(
                    "`sync_batch_norm` needs GPUs, by torch; on CPUs use `frozen_batch_norm` or larger batches"
                )
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if self.args.channels_last and not self.is_fsdp_enabled:  # FSDP2 takes no weights laid out so
            self.model.to(memory_format=torch.channels_last)
        self.augmentation = augmentation
        self.ema = None
        self._resumed_from = None
        self.add_callback(_TellDatasetEpoch(self))
        self.add_callback(_SeedEachProcess())
        if self.args.ema_decay is not None:
            self.add_callback(_AverageWeights(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.ema_decay is not None:
            raise ValueError(
                "`ema_decay` does not work with FSDP: sharded weights are not averaged; use DDP or no average"
            )
        if self.accelerator.is_fsdp2:
            # Accelerate would cast weights to bfloat16 but not the statistics of BatchNorm, which torch refuses:
            # weights stay in float32, and `autocast_smart_context_manager` lowers the precision as under DDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, *args, **kwargs):
        if self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.args.layer_decay)
            for group in groups:
                del group["names"]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            cosine_share = 1 - self.args.cooldown_epochs / self.args.num_train_epochs
            self.lr_scheduler = cosine_schedule(
                self.optimizer if optimizer is None else optimizer,
                self.args.learning_rate,
                steps=round(num_training_steps * cosine_share),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                warmup_learning_rate=self.args.warmup_learning_rate,
                floor=self.args.min_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].contiguous(memory_format=torch.channels_last)}
        return inputs

    def training_step(self, model, inputs: dict, num_items_in_batch=None):
        if self.augmentation is not None:
            inputs = self._prepare_inputs(inputs)
            pixel_values, labels = self.augmentation(inputs["pixel_values"], inputs["labels"])
            inputs = {**inputs, "pixel_values": pixel_values, "labels": labels}
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, *args, **kwargs):
        if self.args.frozen_batch_norm:
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return super().compute_loss(model, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        with self._whole_split():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        with self._whole_split():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _whole_split(self):
        """`dataloader_drop_last` is for training: an evaluation that left images out would be wrong."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def start_average(self) -> None:
        """Make the averaged copy, from the checkpoint that is resumed or from the weights as they are."""
        from timm.utils import ModelEmaV3

        model = self.accelerator.unwrap_model(self.model)
        self.ema = ModelEmaV3(model, decay=self.args.ema_decay, use_warmup=self.args.ema_warmup)
        if self._resumed_from is not None:
            weights = Path(self._resumed_from) / "ema" / "model.safetensors"
            if not weights.exists():
                raise FileNotFoundError(f"cannot resume the average of the weights: there is no {weights}")
            load_model(self.ema.module, weights)

    def update_average(self) -> None:
        self.ema.update(self.accelerator.unwrap_model(self.model), step=self.state.global_step)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        trained = self.model
        if self.ema is not None:
            self.model = self.ema.module
        try:
            self._share_statistics(self.model)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.model = trained
        if self.compute_loss_func is not None and output.label_ids is not None:
            # The library's is a mean of batch means, and with several processes images that fill the last count twice.
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[f"{metric_key_prefix}_loss"] = self.compute_loss_func(
                ImageClassifierOutput(logits=logits), labels
            ).item()
        return output

    def _share_statistics(self, model: torch.nn.Module) -> None:
        """BatchNorm statistics of process 0 for all: each has counted its own batches, DDP's last one, FSDP's all."""
        if self.args.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self.ema is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / "ema"
            self.ema.module.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint


class _TellDatasetEpoch(TrainerCallback):
    """Gives the training data the number of the epoch, where they take it."""

    def __init__(self, trainer: ViTAETrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch))


class _SeedEachProcess(TrainerCallback):
    """Gives each of several processes its own random stream; a resumed one then gets its own state back."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)


class _AverageWeights(TrainerCallback):
    """Tells the trainer when an update is done, whatever gradient accumulation there is."""

    def __init__(self, trainer: ViTAETrainer):
        self.trainer = trainer

    def on_train_begin(self, *args, **kwargs):
        self.trainer.start_average()

    def on_step_end(self, *args, **kwargs):
        self.trainer.update_average()
