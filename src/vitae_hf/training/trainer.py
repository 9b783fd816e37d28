# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The library's Trainer with the authors' optimizer settings, device augmentation and an average of the weights."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, ProgressCallback
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..data.augmentation import DeviceAugmentation, DeviceNormalization
from ..messages import listed
from .arguments import ViTAETrainingArguments
from .average import WeightAverage
from .batch_norm import freeze_statistics, one_value_norms, share_statistics
from .callbacks import ImageProgress, SeedEachProcess, StopOnSignal, Throughput
from .checkpoints import WholeCheckpoints, last_checkpoint
from .loaders import ImageLoaders, TellDatasetEpoch
from .merging import merge_groups
from .optimization import cosine_schedule, parameter_groups
from .readback import Readback


logger = logging.get_logger(__name__)


class ViTAETrainer(WholeCheckpoints, ImageLoaders):
    """A Trainer that follows [`ViTAETrainingArguments`].

    With `ema_decay`, `evaluate` and `predict` use the averaged weights once training has begun, every checkpoint and
    the saved model hold them as a complete model in their folder `ema/`, and a resumed run continues the average.

    A loss that is not finite stops the run before the update, with a `FloatingPointError` that names step and samples.
    SIGTERM saves a checkpoint and stops; `stop.received` then says so.

    Several processes begin with equal weights and draw different random numbers (drop path, mixup, erasing), as one
    process would for different images. They evaluate with the BatchNorm statistics of the first process, which are
    also those that are saved.

    Attributes:
        stop ([`StopOnSignal`]), throughput ([`Throughput`]): callbacks of this run.
        average ([`WeightAverage`], *optional*): the callback that keeps the averaged weights; none without `ema_decay`.

    Raises:
        ValueError: `ema_decay` with FSDP, or `sync_batch_norm` with several processes on CPUs.
    """

    args: ViTAETrainingArguments
    model: PreTrainedModel
    optimizer: Any  # none before training begins
    eval_dataset: Any  # one of this package's data sets
    processing_class: Any
    lr_scheduler: Any
    stop: StopOnSignal
    throughput: Throughput
    average: WeightAverage | None

    def __init__(self, *args: Any, augmentation: DeviceAugmentation | DeviceNormalization | None = None, **kwargs: Any):
        """
        Args:
            augmentation: of each training batch, on the device; default: none.
            args, kwargs: the library's.
        """
        super().__init__(*args, **kwargs)
        if self.args.sync_batch_norm and self.args.world_size > 1:
            if self.args.device.type == "cpu":
                raise ValueError(
                    "`sync_batch_norm` needs GPUs, by torch; on CPUs use `frozen_batch_norm` or larger batches"
                )
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if self.args.merge_groups:
            merge_groups(self.model)
        if self.args.channels_last and not self.is_fsdp_enabled:  # FSDP2 refuses weights in this layout
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # hidden by a decorator
        self.augmentation = augmentation
        self.stop, self.throughput = StopOnSignal(), Throughput()
        self.average = None if self.args.ema_decay is None else WeightAverage(self)
        has_progress = self.pop_callback(ProgressCallback) is not None
        own = [self.stop, self.throughput, ImageProgress() if has_progress else None, TellDatasetEpoch(self)]
        for callback in [*own, SeedEachProcess(), self.average]:
            if callback is not None:
                self.add_callback(callback)
        self._names: list[str | int] | None = None  # of the samples of the last batch
        self._is_finite: Readback | bool = True  # the loss of that batch
        self._is_checked = False

    @property
    def averaged_model(self) -> PreTrainedModel | None:
        """The model with the averaged weights; none without `ema_decay` and before training begins."""
        return None if self.average is None else self.average.model

    @property
    def evaluated_model(self) -> PreTrainedModel:
        """The model that an evaluation is about: the averaged one if there is one."""
        return self.model if self.averaged_model is None else self.averaged_model

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.ema_decay is not None:
            raise ValueError(
                "`ema_decay` does not work with FSDP: sharded weights are not averaged; use DDP or no average"
            )
        if self.accelerator.is_fsdp2:
            # Accelerate would cast weights to bfloat16 but not the statistics of BatchNorm, which torch refuses.
            # Weights stay in float32, and `autocast_smart_context_manager` lowers the precision as under DDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        if self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            given = self.optimizer_cls_and_kwargs
            optimizer_class, options = given or self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.args.layer_decay)
            for group in groups:
                del group["names"]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            rate, floor = self.args.learning_rate, self.args.min_learning_rate
            if 0 < rate < floor or rate == floor == ViTAETrainingArguments.min_learning_rate:
                logger.warning(
                    "the learning rate, %g, is not above its floor, `min_learning_rate`, %g, so that it stays the same",
                    *(rate, floor),
                )
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

    def _get_learning_rate(self) -> float:
        """The full one, at which the head learns."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._is_checked = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop.restore()  # after an error too, which no callback is told of

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed: the library would train on
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As the library's, which with `save_strategy="best"` saves where this is true: also where the run stops."""
        return super()._determine_best_metric(*args, **kwargs) or self.stop.received

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "names" in inputs:
            self._names = inputs["names"]
            inputs = {name: value for name, value in inputs.items() if name != "names"}
        if self.args.channels_last:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].contiguous(memory_format=torch.channels_last)}
        return inputs

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.augmentation is not None:
            inputs = self._prepare_inputs(inputs)
            given: Any = inputs.get("labels")  # none for a `DeviceNormalization`
            pixel_values, labels = self.augmentation(inputs["pixel_values"], given)
            inputs = {**inputs, "pixel_values": pixel_values}
            if labels is not None:
                inputs["labels"] = labels
        if not self._is_checked:
            self._check_smallest_batch(model, inputs)
            self._is_checked = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._is_finite:
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}, at learning rate"
                f" {self._get_learning_rate():.3g}, for a batch of {self._names}; the last checkpoint is"
                f" {last_checkpoint(self.args.output_dir)}"
            )
        return loss

    def _check_smallest_batch(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Before the first step, find out whether BatchNorm will get single values, which it cannot normalise.

        Raises:
            ValueError: an epoch has a batch of one picture, and pictures of this size become maps of one pixel.
        """
        shared = self.args.sync_batch_norm and self.args.world_size > 1
        if shared or self.args.frozen_batch_norm or self.smallest_batch() > 1:
            return
        pixel_values = self._prepare_inputs(inputs)["pixel_values"][:1]
        with self.compute_loss_context_manager():
            norms = one_value_norms(self.accelerator.unwrap_model(model, keep_torch_compile=False), pixel_values)
        if norms:
            batch, size = self._train_batch_size, "×".join(map(str, pixel_values.shape[-2:]))
            which, remedies = "every batch", "a larger `per_device_train_batch_size`"
            if batch > 1:
                which = f"the last batch of {len(self.train_dataset):,} in batches of {batch}"
                remedies = "another `per_device_train_batch_size`, `dataloader_drop_last`"
            raise ValueError(
                f"{which} has one picture, and pictures of {size} pixels become maps of one pixel, which BatchNorm"
                f" cannot normalise by themselves, at {listed(norms)}: choose {remedies}, larger pictures, or"
                " `frozen_batch_norm`"
            )

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.args.frozen_batch_norm:
            freeze_statistics(model)
        result = super().compute_loss(model, *args, **kwargs)
        if model.training:  # ask before the backward pass is queued; `training_step` reads the answer while that runs
            loss = result[0] if isinstance(result, tuple) else result
            self._is_finite = Readback(loss.detach().isfinite())
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        trained, self.model = self.model, self.evaluated_model
        try:
            if self.args.world_size > 1:
                share_statistics(self.model)
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.model = trained
        if self.compute_loss_func is not None and output.label_ids is not None and output.metrics is not None:
            # The library takes a mean of the means of batches, and several processes fill up their last batch with
            # images that then count twice.
            outputs = ImageClassifierOutput(logits=torch.from_numpy(output.predictions))
            loss = self.compute_loss_func(outputs, torch.from_numpy(output.label_ids))
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss.item()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.average is not None and self.average.model is not None and self.args.should_save:
            self.average.save(output_dir or self.args.output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if self.average is not None and self.average.model is not None and best is not None:
            self.average.load(best)
