# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train UperNet with a ViTAE backbone for semantic segmentation: a class for each pixel of a picture.

    vitae segment --config upernet-vitaev2-s-ade20k --dataset FOLDER \\
        --class_names FILE --model_name_or_path outputs/vitaev2-s --output_dir outputs/ade20k
    vitae segment --config upernet-garment-scenes --output_dir outputs/scenes   # in a checkout, which has the data

`--dataset` is a Hub name or a folder, with one column of pictures called image and one of masks called mask, annotation
or label: a class at each pixel, 255 for none. The backbone begins with a trained classifier or backbone
(`--model_name_or_path`; a trained UperNet goes on whole) or at random (`--preset`). Every argument of the library's
`TrainingArguments` works; resuming, Ctrl-C, averaged weights and layer-wise decay are as in `vitae train`. At the
end the folder holds the model (`ema/` with averaged weights, if there are any), `eval_results.json`,
`segmentation_metrics.json` with the figures of each class, `overlays.png`, `training_curves.png` and a model card.
`--push_to_hub` then publishes what was evaluated.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard
from transformers.trainer_utils import SchedulerType

from .. import config_from_preset
from ..dense.backbone import dense_config
from ..dense.segmentation.data import SegmentationDataset, collate_masks, load_masked_images, mask_class_names
from ..dense.segmentation.evaluation import overlays
from ..dense.segmentation.model import load_segmenter, new_segmenter
from ..dense.segmentation.trainer import SegmentationTrainer
from ..dense.segmentation.transforms import MaskAugmentationArguments, evaluation_sample, segmentation_transform
from ..failures import about
from ..files import write_json
from ..heads_vitae import UperNetForSemanticSegmentation
from ..hub.cards import FIGURES, TEMPLATES, model_card
from ..hub.publishing import publish
from ..loading import find_checked_model, segmentation_processor
from ..training.arguments import StartArguments, ViTAETrainingArguments
from ..training.run import COSINE, Task, exit_status, run_task
from ..training.splits import choose_splits


KIND = "image-segmentation"  # the Hub's name for the task


@dataclass(kw_only=True)
class SegmentationArguments(StartArguments):
    """What to train on what pictures and masks."""

    mask_column_name: str | None = field(default=None, metadata={"help": "The column of masks, if there are several."})
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 in a mask is no class, and 1 the first, as in ADE20K."}
    )
    ignored_class: int | None = field(
        default=None, metadata={"help": "A class in masks that is ignored like 255, counted as the others are."}
    )
    head_channels: int = field(default=512, metadata={"help": "Width of a new head."})
    frozen_stages: int | None = field(
        default=None,
        metadata={"help": "How many stages of the backbone, the first ones, stay as they are; default: the model's."},
    )
    rescaled_cells: list[int] | None = field(
        default=None,
        metadata={
            "help": "The four cells of a plain variant, numbered from 0, after which maps are taken, as RVSA has it;"
            " default: those of the model, or a feature pyramid of the last map."
        },
    )
    overlays: int = field(default=8, metadata={"help": "How many pictures to draw with truth and prediction."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("overlays", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Segmentation(Task[SegmentationTrainer]):
    """UperNet on pictures with masks."""

    run: SegmentationArguments
    augmentation: MaskAugmentationArguments
    training: ViTAETrainingArguments

    command: ClassVar[str] = "vitae segment"
    defaults: ClassVar[dict[str, Any]] = {
        "lr_scheduler_type": "polynomial",  # mmsegmentation's "poly"; linear unless the keywords say otherwise
        "per_device_eval_batch_size": 1,  # pictures of an evaluation differ in size
        "dataloader_drop_last": True,  # BatchNorm cannot normalise a last batch of one
    }
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "--label_smoothing_factor does not go with segmentation",
        "prediction_loss_only": "--prediction_loss_only leaves out the mean IoU, which every run of this command tells",
    }
    idle: ClassVar[dict[str, str]] = dict.fromkeys(COSINE, "the schedule is that of --lr_scheduler_type")
    accuracies: ClassVar[tuple[str, ...]] = tuple(metric for _, _, metric in FIGURES[KIND])
    metrics: ClassVar[tuple[str, ...]] = (*accuracies, "mean_accuracy", "loss")

    def build_model(self, names: dict[int, str]) -> UperNetForSemanticSegmentation:
        """UperNet with a new backbone, or with a trained one."""
        run = self.run
        names_of_fields = ("frozen_stages", "drop_path_rate", "rescaled_cells")
        changes = {name: value for name in names_of_fields if (value := getattr(run, name)) is not None}
        if run.preset is not None:
            return new_segmenter(dense_config(config_from_preset(run.preset), **changes), names, run.head_channels)
        name = str(run.model_name_or_path)
        with about(name):
            source = find_checked_model(name)
            return load_segmenter(source, names, run.head_channels, **changes)

    def build_trainer(self) -> SegmentationTrainer:
        run, augmentation, training = self.run, self.augmentation, self.training
        with training.main_process_first(desc="data"):
            splits = load_masked_images(run.dataset, run.dataset_name, run.image_column_name, run.mask_column_name)
        choose_splits(run, splits)
        names = mask_class_names(splits, run.class_names)
        processor = segmentation_processor(augmentation.short_side, run.reduce_labels)
        common: dict[str, Any] = {"num_labels": len(names), "reduce_labels": run.reduce_labels}
        common["ignored_class"] = run.ignored_class
        transform = segmentation_transform(augmentation)
        train_data = SegmentationDataset(splits[run.train_split], transform, seed=training.seed, **common)
        eval_data = SegmentationDataset(splits[run.eval_split], partial(evaluation_sample, processor), **common)
        train_data.check()
        eval_data.check()
        return SegmentationTrainer(
            self.build_model(names),
            training,
            data_collator=collate_masks,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processor,
        )

    def figures(self, trainer: SegmentationTrainer, metrics: dict[str, float]) -> dict[str, Any]:
        return {
            "mean_iou_percent": round(metrics["eval_mean_iou"], 2),
            "pixel_accuracy_percent": round(metrics["eval_pixel_accuracy"], 2),
            "constant_mean_iou_percent": round(trainer.figures["constant_mean_iou"], 2),
            "updates": trainer.state.global_step,
            "seconds": round(trainer.throughput.seconds),
        }

    def draw(self, trainer: SegmentationTrainer, record: dict[str, Any]) -> list[Path]:
        """`segmentation_metrics.json`, with the figures of each class, and `overlays.png`."""
        output, data = Path(self.training.output_dir), trainer.eval_dataset
        write_json(trainer.figures, output / "segmentation_metrics.json")
        shown = trainer.evaluated_model, trainer.processing_class, data, record["mean_iou_percent"], self.run.overlays
        overlays(*shown).savefig(output / "overlays.png", dpi=110)
        return [output / "overlays.png"]

    def settings(self, trainer: SegmentationTrainer) -> dict[str, Any]:
        training = self.training
        return {
            "learning rate": f"{training.learning_rate:g}, {SchedulerType(training.lr_scheduler_type).value}",
            "average of the weights": training.ema_decay or "none",
            "augmentation": ", ".join(f"{name} {value}" for name, value in vars(self.augmentation).items()),
            "drop path": getattr(trainer.model.config.backbone_config, "drop_path_rate", "none"),
            "frozen stages": getattr(trainer.model.config.backbone_config, "frozen_stages", 0),
        }

    def card(self, trainer: SegmentationTrainer, record: dict[str, Any], **values: Any) -> ModelCard:
        model = trainer.model
        return model_card(
            TEMPLATES / "segmentation.md",
            task=KIND,
            backbone=type(model.backbone).__name__,
            parameters=model.num_parameters(),
            num_labels=model.config.num_labels,
            origin="trained from scratch" if self.run.preset else f"begun with `{self.run.model_name_or_path}`",
            short_side=self.augmentation.short_side,
            metrics={**trainer.figures, "loss": record["eval_loss"]},
            **values,
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run_task(Segmentation.parse(argv), publish)


status = exit_status
