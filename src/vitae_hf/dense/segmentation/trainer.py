# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The trainer of segmenters: its loss, its schedule, and the mean IoU of whole pictures."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, Trainer, UperNetForSemanticSegmentation
from transformers.trainer_utils import EvalLoopOutput, SchedulerType

from ...evaluation.metrics import MeanIoU
from ...loading import label_names
from ...training.arguments import ViTAETrainingArguments
from ...training.trainer import ViTAETrainer
from .data import IGNORED_CLASS, SegmentationDataset


class SegmentationTrainer(ViTAETrainer):
    """A [`ViTAETrainer`] for segmenters, with the library's schedule (`lr_scheduler_type`) in place of the cosine.

    An evaluation measures the mean IoU of the whole split at the size of the masks. It counts batch by batch
    (`batch_eval_metrics`), so that it keeps the predictions of one batch only.

    Attributes:
        figures (`dict`): of the last evaluation, with those of each class; see [`MeanIoU`].

    Raises:
        ValueError: a batch of one picture: the head pools it to one pixel, which BatchNorm cannot normalise unless it
            is frozen.
    """

    model: UperNetForSemanticSegmentation
    eval_dataset: SegmentationDataset

    def __init__(self, model: UperNetForSemanticSegmentation, args: ViTAETrainingArguments, **kwargs: Any):
        pictures = args.train_batch_size * (args.world_size if args.sync_batch_norm else 1)
        if pictures < 2 and not args.frozen_batch_norm:
            raise ValueError(
                "UperNet pools pictures to one pixel and normalises over the batch: at least 2 pictures per device are"
                f" needed in training, got per_device_train_batch_size {args.per_device_train_batch_size}"
            )
        args.batch_eval_metrics = True
        if model.backbone.out_features[-1] != model.backbone.stage_names[-1]:
            args.ddp_find_unused_parameters = True  # no loss reaches the stages after the last map
        self.figures: dict[str, Any] = {}
        self._iou = MeanIoU(list(label_names(model.config).values()))
        super().__init__(model, args, compute_metrics=self._count, **kwargs)
        # UperNet takes any keywords but ignores `num_items_in_batch`. Told so, the library divides the sum of the means
        # of accumulated batches by their number.
        self.model_accepts_loss_kwargs = False

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.args.lr_scheduler_type == SchedulerType.POLYNOMIAL and not self.args.lr_scheduler_kwargs:
            self.args.lr_scheduler_kwargs = {"power": 1.0, "lr_end": 0.0}  # mmsegmentation's, to 0
        return Trainer.create_scheduler(self, num_training_steps, optimizer)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The network's own loss, but 0 for a batch whose pixels are all ignored, of which the mean would be NaN."""
        is_ignored = (inputs["labels"] == IGNORED_CLASS).all()  # stays on the device, which must not be waited for
        labels = inputs["labels"].masked_fill(is_ignored, 0)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs) * ~is_ignored

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._iou.reset()  # an interrupted evaluation has left its counts
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits
        logits = torch.nn.functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_CLASS, reduction="sum")
        loss = losses / (labels != IGNORED_CLASS).sum().clamp(min=1)
        if prediction_loss_only:
            return loss, None, None
        return (
            loss,
            logits.argmax(1).flatten(1),
            labels.flatten(1),
        )  # flat: the library gathers processes with other heights and widths

    def _count(self, result: EvalPrediction, compute_result: bool) -> dict[str, float]:
        predictions, references = (torch.as_tensor(ids).cpu() for ids in (result.predictions, result.label_ids))
        self._iou.add_batch(predictions=predictions, references=references)
        if not compute_result:
            return {}
        self.figures = self._iou.compute()
        return {name: self.figures[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}
