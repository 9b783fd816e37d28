# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a ViTAE classifier, from scratch or from a model, on labelled images.

    vitae train --config vitae-t --dataset ILSVRC/imagenet-1k --output_dir outputs/vitae-t
    vitae train --model_name_or_path outputs/vitae-t --dataset FOLDER --output_dir outputs/mine

`--dataset` is a Hub name or a folder: parquet files, or one folder of images for each class. A recipe is a YAML file
of these arguments; the command line overrides it. Every argument of the library's `TrainingArguments` works,
except `--lr_scheduler_type`: the schedule is the authors' warm-up, cosine and cool-down.
`--resume_from_checkpoint last` continues from the newest whole checkpoint of the output folder, or begins where there
is none; Ctrl-C and SIGTERM save one after the update and stop, with status 130 and 143. At the end the folder holds
the model, `ema/` with the averaged weights if there are any (then these are evaluated), `eval_results.json`,
`training_curves.png` and a model card; TensorBoard's files are in `runs/` (`--report_to trackio`, `none` and others
work too). `--push_to_hub` then publishes what was evaluated, as `vitae push` does.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, EvalPrediction, PreTrainedModel

from .. import ViTAEImageProcessor, config_from_preset
from ..class_names import read_class_names
from ..data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss, training_transform
from ..data.samples import IGNORED_LABEL, collate
from ..data.sources import class_names, draw_by_class, load_labelled_images
from ..evaluation.metrics import TopKAccuracy
from ..failures import about
from ..hub.cards import FIGURES, TEMPLATES, model_card
from ..hub.publishing import publish
from ..loading import check_task, find_checked_model, order_of_classes
from ..training.arguments import ImageArguments, StartArguments, ViTAETrainingArguments
from ..training.run import SCHEDULE, Task, exit_status, run_task
from ..training.splits import evaluation_images, find_stream, load_splits, training_images
from ..training.trainer import ViTAETrainer


@dataclass(kw_only=True)
class ClassificationArguments(ImageArguments, StartArguments):
    """What to train on what images."""

    train_share: float = field(
        default=1.0, metadata={"help": "Train on this share of every class, drawn with `data_seed` or `seed`."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column of labels, if there are several."}
    )
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Default: the model's."})
    base_ema_decay: float | None = field(
        default=None, metadata={"help": "Sets ema_decay to this to the power of global batch / 512; 0: no average."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.train_share <= 1:
            raise ValueError(f"--train_share must be above 0 and at most 1, got {self.train_share}")
        if self.train_share < 1 and self.streaming:
            raise ValueError("--train_share draws from all images; it does not go with --streaming")


@torch.no_grad()
def reorder_head(model: PreTrainedModel, order: list[int]) -> None:
    """Put the rows of a classifier into another order.

    Raises:
        ValueError: its head is no linear layer.
    """
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            "it has the classes of the data in another order, and no linear `classifier` that could follow"
        )
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            parameter.copy_(parameter[order])


@dataclass
class Classification(Task[ViTAETrainer]):
    """A classifier of labelled images."""

    run: ClassificationArguments
    augmentation: AugmentationArguments
    training: ViTAETrainingArguments

    command: ClassVar[str] = "vitae train"
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "smooth labels by --label_smoothing, not --label_smoothing_factor",
        "prediction_loss_only": "--prediction_loss_only leaves out the accuracy, which every run of this command tells",
    }
    idle: ClassVar[dict[str, str]] = SCHEDULE
    accuracies: ClassVar[tuple[str, ...]] = tuple(metric for _, _, metric in FIGURES["image-classification"])

    def build_model(self, names: dict[int, str]) -> PreTrainedModel:
        """A new model of a preset, or a trained one with a head for these classes."""
        run = self.run
        overrides: dict[str, Any] = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        rates = {"drop_path_rate": run.drop_path_rate, "hidden_dropout_prob": run.hidden_dropout_prob}
        overrides |= {name: rate for name, rate in rates.items() if rate is not None}
        if run.preset is not None:
            size = {} if run.image_size is None else {"image_size": run.image_size}
            return AutoModelForImageClassification.from_config(config_from_preset(run.preset, **size, **overrides))
        name = str(run.model_name_or_path)
        with about(name):
            source = find_checked_model(name)
            check_task(source, "a classifier or a network without a head")
            before = AutoConfig.from_pretrained(source).id2label
            model = AutoModelForImageClassification.from_pretrained(source, ignore_mismatched_sizes=True, **overrides)
            if (order := order_of_classes(before, names)) is not None:
                reorder_head(model, order)
        if run.image_size not in (None, model.config.image_size):
            model.resize_position_embeddings(run.image_size)
        return model

    def build_trainer(self) -> ViTAETrainer:
        run, training = self.run, self.training
        names = read_class_names(run.class_names) if run.class_names else None
        shards = find_stream(run, training, names=names, label_column=run.label_column_name)
        if shards is not None and shards.classes is not None:
            names = list(shards.classes)
        labelled = partial(load_labelled_images, names=names, label_column=run.label_column_name)
        splits = load_splits(run, training, labelled)
        if run.train_share < 1:
            drawn, _ = draw_by_class(splits[run.train_split], run.train_share, training.data_seed, "--train_share")
            splits[run.train_split] = drawn
        found = class_names(splits)
        if len(found) < 2:
            raise ValueError(f"{run.dataset} has one class, {found[0]!r}: a classifier tells at least two apart")
        model = self.build_model(found)
        num_labels, size = len(found), model.config.image_size
        processor = ViTAEImageProcessor(size=size, crop_pct=run.crop_pct)
        processor.validate()  # before the training, not after it
        source = splits[run.train_split] if shards is None else shards
        return ViTAETrainer(
            model,
            training,
            data_collator=collate,
            train_dataset=training_images(
                run, training, source, training_transform(size, self.augmentation), num_labels
            ),
            eval_dataset=evaluation_images(run, splits[run.eval_split], processor, drop_bad=True),
            processing_class=processor,
            compute_loss_func=soft_target_loss,
            compute_metrics=accuracy,
            augmentation=DeviceAugmentation(num_labels, self.augmentation),
        )

    def figures(self, trainer: ViTAETrainer, metrics: dict[str, float]) -> dict[str, Any]:
        return {f"{name}_percent": round(metrics[f"eval_{name}"], 3) for name in self.accuracies}

    def settings(self, trainer: ViTAETrainer) -> dict[str, Any]:
        return {
            "average of the weights": self.training.ema_decay or "none",
            "augmentation": ", ".join(f"{name} {value}" for name, value in vars(self.augmentation).items()),
            "drop path": getattr(trainer.model.config, "drop_path_rate", "none"),
        }

    def card(self, trainer: ViTAETrainer, record: dict[str, Any], **values: Any) -> ModelCard:
        return model_card(
            TEMPLATES / "trained.md",
            architecture=type(trainer.model).__name__,
            parameters=trainer.model.num_parameters(),
            num_labels=trainer.model.config.num_labels,
            origin="trained from scratch" if self.run.preset else f"fine-tuned from `{self.run.model_name_or_path}`",
            size=trainer.model.config.image_size,
            crop_pct=self.run.crop_pct,
            metrics={"top1": record["top1_percent"], "top5": record["top5_percent"], "loss": record["eval_loss"]},
            **values,
        )


def accuracy(result: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 of the pictures that could be read.

    Raises:
        ValueError: none could.
    """
    labels = np.asarray(result.label_ids)
    rated = labels != IGNORED_LABEL
    if not rated.any():
        raise ValueError(f"none of the {len(labels)} pictures to evaluate can be read")
    return TopKAccuracy().compute(predictions=result.predictions[rated], references=labels[rated])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run_task(Classification.parse(argv), publish)


status = exit_status
