# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The trainer of detectors: their losses, a schedule in steps, and COCO's average precision of whole pictures."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Mask2FormerConfig, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ...evaluation.average_precision import LEAST_SCORE, MeanAveragePrecision, as_prediction
from ...evaluation.detections import as_objects
from ...loading import label_names
from ...training.arguments import ViTAETrainingArguments
from ...training.optimization import step_schedule
from ...training.trainer import ViTAETrainer
from .data import DetectionDataset
from .models import DETECTORS, kind_of, mask2former_inputs, training_inputs


LOGGED = ("map", "map_50", "map_75", "mar_100", "mask_map", "mask_map_50", "mask_map_75", "mask_mar_100")


class DetectionTrainer(ViTAETrainer):
    """A [`ViTAETrainer`] for the detectors of `DETECTORS`, with the library's schedule or one in steps.

    An evaluation, of [`DetectionDataset`]s, measures COCO's average precision of the whole split, on whole pictures,
    through the image processor, as users get boxes and masks. It computes no loss.

    Attributes:
        figures (`dict`): of the last evaluation, with those of each class; see [`MeanAveragePrecision`].

    Args:
        model, args, kwargs: the library's.
        lr_steps: epochs after each of which the learning rate is divided by ten, behind a linear warm-up; default: the
            library's schedule (`lr_scheduler_type`).

    Raises:
        ValueError: one of `lr_steps` is not within the run.
    """

    eval_dataset: DetectionDataset

    def __init__(
        self, model: PreTrainedModel, args: ViTAETrainingArguments, lr_steps: list[float] | None = None, **kwargs: Any
    ):
        if lr_steps and not 0 < min(lr_steps) <= max(lr_steps) < args.num_train_epochs:
            raise ValueError(
                f"`lr_steps` must be above 0 and below the {args.num_train_epochs:g} epochs of the run, got {lr_steps}"
            )
        args.ddp_find_unused_parameters = True  # some weights get no gradient where a batch has no objects
        self.lr_steps = lr_steps
        self.with_masks: bool = DETECTORS[str(kind_of(model.config))].with_masks
        self.figures: dict[str, Any] = {}
        self._found: dict[int, dict[str, Any]] = {}
        super().__init__(model, args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_steps is None:
            return Trainer.create_scheduler(self, num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = step_schedule(
                self.optimizer if optimizer is None else optimizer,
                self.args.learning_rate,
                [round(epoch / self.args.num_train_epochs * num_training_steps) for epoch in self.lr_steps],
                self.args.get_warmup_steps(num_training_steps),
                self.args.warmup_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = training_inputs(inputs)
        if isinstance(self.model.config, Mask2FormerConfig):
            inputs = mask2former_inputs(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._found = {}  # the last evaluation has left boxes, those of other processes too
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        pairs = list(self._found.items())
        # Several processes share the rows, and take some twice so that all have as many.
        self._found = dict(gather_object(pairs) if self.args.world_size > 1 else pairs)
        self.figures = self._measure(dataloader.dataset)
        prefix = kwargs.get("metric_key_prefix", "eval")
        logged = {f"{prefix}_{name}": self.figures[name] for name in LOGGED if self.figures.get(name) is not None}
        return output._replace(metrics={**(output.metrics or {}), **logged})

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        if not inputs["pixel_mask"].all():
            raise ValueError(
                "the pictures of a batch differ in size, which an evaluation does not take: set"
                " per_device_eval_batch_size to 1"
            )
        with self.compute_loss_context_manager():
            outputs = model(pixel_values=inputs["pixel_values"])
        sizes = [tuple(label["size"].tolist()) for label in inputs["labels"]]
        for row, found in zip(inputs["rows"], as_objects(self.processing_class, outputs, sizes, LEAST_SCORE)):
            self._found[row] = as_prediction(found)
        return None, None, None

    def _measure(self, data: Any) -> dict[str, Any]:
        metric = MeanAveragePrecision(list(label_names(self.model.config).values()), self.with_masks)
        for row in sorted(self._found):
            objects, _ = data.objects(row)
            metric.add(prediction=self._found[row], reference=vars(objects))
        return metric.compute()
