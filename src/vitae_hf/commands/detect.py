# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a detector with a ViTAE backbone: boxes of the objects in a picture, and with some detectors masks.

    vitae detect --config mask-rcnn-vitaev2-s-coco-1x --dataset FOLDER \\
        --model_name_or_path outputs/vitaev2-s/ema --output_dir outputs/coco
    vitae detect --config rt-detr-garment-scenes --output_dir outputs/boxes   # in a checkout, which has the data

`--detector` is one of rt_detr, deformable_detr and faster_rcnn, which find boxes, or mask2former and mask_rcnn, which
find masks too. `--dataset` is a Hub name or a folder: COCO's JSON files and their pictures, parquet files with columns
`image` and `objects`, or pictures with a `metadata.jsonl` that has `file_name` and `objects`; of each object a box as
left, top, width and height (`bbox`; as left, top, right and bottom with `--box_format xyxy`), a class (`category`) and,
for masks, a `segmentation`. The backbone begins with a trained classifier or backbone (`--model_name_or_path`; a
trained detector goes on whole) or at random (`--preset`). Every argument of the library's `TrainingArguments` works;
resuming, Ctrl-C, averaged weights and layer-wise decay are as in `vitae train`. At the end the folder holds the model
(`ema/` with averaged weights, if there are any), `eval_results.json`, `detection_metrics.json` with the precision of
each class, `predictions.png`, `training_curves.png` and a model card. `--push_to_hub` then publishes what was
evaluated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType

from .. import config_from_preset
from ..dense.detection.data import DetectionDataset, collate_objects, load_boxed_images
from ..dense.detection.evaluation import predictions
from ..dense.detection.models import (
    DETECTORS,
    HeadSize,
    detector_backbone,
    load_detector,
    make_processor,
    new_detector,
)
from ..dense.detection.trainer import LOGGED, DetectionTrainer
from ..dense.detection.transforms import BoxAugmentationArguments, ObjectTransform, evaluation_transform
from ..failures import about
from ..files import write_json
from ..hub.cards import TEMPLATES, model_card
from ..hub.publishing import publish
from ..loading import find_checked_model
from ..training.arguments import StartArguments, ViTAETrainingArguments
from ..training.run import COSINE, Task, exit_status, run_task
from ..training.splits import choose_splits


BOXES, MASKS = "object-detection", "instance-segmentation"  # what a card is about


@dataclass(kw_only=True)
class DetectionArguments(StartArguments):
    """What to train on what pictures and objects."""

    detector: Literal["rt_detr", "deformable_detr", "faster_rcnn", "mask2former", "mask_rcnn"] = field(
        default="rt_detr", metadata={"help": "The kind of detector; the last two find masks too."}
    )
    head_channels: int = field(default=256, metadata={"help": "Width of a new head."})
    decoder_layers: int = field(default=6, metadata={"help": "Layers of a new decoder; the R-CNNs have none."})
    num_queries: int | None = field(
        default=None, metadata={"help": "Objects that a new DETR can find at most; default: 300, mask2former 100."}
    )
    frozen_stages: int | None = field(
        default=None,
        metadata={"help": "How many stages of the backbone, the first ones, stay as they are; default: the model's."},
    )
    lr_steps: list[float] | None = field(
        default=None,
        metadata={
            "help": "Epochs after each of which the rate is a tenth; default: the schedule of lr_scheduler_type."
        },
    )
    objects_column_name: str | None = field(
        default=None, metadata={"help": "The column of objects, if there are several."}
    )
    box_format: Literal["xywh", "xyxy"] = field(
        default="xywh", metadata={"help": "Boxes in pixels: left, top, width, height, or left, top, right, bottom."}
    )
    on_bad_object: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Whether a wrong box, class or mask is an error, or left out and counted."}
    )
    pictures: int = field(default=8, metadata={"help": "How many pictures to draw with truth and prediction."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_channels", "decoder_layers", "num_queries", "pictures"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


@dataclass
class Detection(Task[DetectionTrainer]):
    """A detector on pictures with boxes, and maybe masks."""

    run: DetectionArguments
    augmentation: BoxAugmentationArguments
    training: ViTAETrainingArguments

    command: ClassVar[str] = "vitae detect"
    defaults: ClassVar[dict[str, Any]] = {
        "per_device_eval_batch_size": 1,  # pictures of an evaluation differ in size
        "metric_for_best_model": "map",
    }
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "--label_smoothing_factor does not go with detection"
    }
    idle: ClassVar[dict[str, str]] = dict.fromkeys(
        COSINE[:2], "the schedule is that of --lr_scheduler_type or --lr_steps"
    )
    accuracies: ClassVar[tuple[str, ...]] = ("map", "map_50", "mask_map")

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the detector
        return tuple(name for name in LOGGED if self.with_masks or not name.startswith("mask"))

    @property
    def with_masks(self) -> bool:
        return DETECTORS[self.run.detector].with_masks

    def build_model(self, names: dict[int, str]) -> PreTrainedModel:
        """A detector with a new backbone, or with a trained one."""
        run = self.run
        head = HeadSize(run.head_channels, run.decoder_layers, run.num_queries)
        given = {"frozen_stages": run.frozen_stages, "drop_path_rate": run.drop_path_rate}
        changes = {name: value for name, value in given.items() if value is not None}
        if run.preset is not None:
            backbone = detector_backbone(config_from_preset(run.preset), run.detector, **changes)
            return new_detector(run.detector, backbone, names, head)
        name = str(run.model_name_or_path)
        with about(name):
            source = find_checked_model(name)
            return load_detector(source, run.detector, names, head, **changes)

    def build_trainer(self) -> DetectionTrainer:
        run, augmentation, training = self.run, self.augmentation, self.training
        if run.detector == "rt_detr" and augmentation.image_size is None:
            augmentation.image_size = [640]
        processor = make_processor(run.detector, augmentation.processor_size)
        with training.main_process_first(desc="data"):
            columns = run.image_column_name, run.objects_column_name
            splits, names = load_boxed_images(run.dataset, run.dataset_name, run.class_names, *columns)
        choose_splits(run, splits)
        common: dict[str, Any] = {
            "names": names,
            "with_masks": self.with_masks,
            "on_bad_object": run.on_bad_object,
            "box_format": run.box_format,
        }
        train_data = DetectionDataset(
            splits[run.train_split], ObjectTransform(augmentation), seed=training.seed, **common
        )
        eval_data = DetectionDataset(splits[run.eval_split], evaluation_transform(processor), **common)
        for data in (train_data, eval_data):  # each process looks at its share of the rows
            data.check(training.process_index, training.world_size)
        return DetectionTrainer(
            self.build_model(names),
            training,
            lr_steps=run.lr_steps,
            data_collator=collate_objects,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processor,
        )

    def figures(self, trainer: DetectionTrainer, metrics: dict[str, float]) -> dict[str, Any]:
        logged = ("map", "map_50", "map_75", *(("mask_map", "mask_map_50", "mask_map_75") if self.with_masks else ()))
        return {
            **{f"{name}_percent": round(metrics.get(f"eval_{name}", 0.0), 2) for name in logged},
            "updates": trainer.state.global_step,
            "seconds": round(trainer.throughput.seconds),
        }

    def draw(self, trainer: DetectionTrainer, record: dict[str, Any]) -> list[Path]:
        """`detection_metrics.json`, with the figures of each class, and `predictions.png`."""
        output, data = Path(self.training.output_dir), trainer.eval_dataset
        write_json(trainer.figures, output / "detection_metrics.json")
        shown = trainer.evaluated_model, trainer.processing_class, data, record["map_percent"], self.run.pictures
        predictions(*shown).savefig(output / "predictions.png", dpi=110)
        return [output / "predictions.png"]

    def settings(self, trainer: DetectionTrainer) -> dict[str, Any]:
        run, training = self.run, self.training
        steps = f"a tenth after epochs {run.lr_steps}" if run.lr_steps else None
        return {
            "learning rate": f"{training.learning_rate:g}, {steps or SchedulerType(training.lr_scheduler_type).value}",
            "average of the weights": training.ema_decay or "none",
            "augmentation": ", ".join(f"{name} {value}" for name, value in vars(self.augmentation).items()),
            "drop path": getattr(trainer.model.config.backbone_config, "drop_path_rate", "none"),
            "frozen stages": getattr(trainer.model.config.backbone_config, "frozen_stages", 0),
        }

    def card(self, trainer: DetectionTrainer, record: dict[str, Any], **values: Any) -> ModelCard:
        model = trainer.model
        size = self.augmentation.processor_size
        resized = f"stretched to {size['height']}×{size['width']} pixels (height × width)" if "height" in size else None
        return model_card(
            TEMPLATES / "detection.md",
            task=MASKS if self.with_masks else BOXES,
            detector=type(model).__name__,
            backbone=type(model.config.backbone_config).__name__.removesuffix("Config"),
            with_masks=self.with_masks,
            parameters=model.num_parameters(),
            num_labels=model.config.num_labels,
            origin="trained from scratch" if self.run.preset else f"begun with `{self.run.model_name_or_path}`",
            resized=resized or f"resized to a shorter side of {size['shortest_edge']} pixels",
            metrics=trainer.figures,
            **values,
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run_task(Detection.parse(argv), publish)


status = exit_status
