# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a plain variant as a masked autoencoder, on images without labels.

    vitae pretrain --config mae-b --dataset FOLDER --output_dir outputs/mae-b
    vitae train --config vitae-b --model_name_or_path outputs/mae-b --dataset LABELLED …

`--dataset` is a Hub name or a folder of images, in parquet files, tars or any folders; labels are not read. A recipe is
a YAML file of these arguments; the command line overrides it. The library's `TrainingArguments`,
`--resume_from_checkpoint last` and SIGTERM do what they do in `vitae train`. At the end the folder holds the
model, `eval_results.json`, `training_curves.png`, a model card, and in `reconstructions/` a picture for each
evaluation, which TensorBoard shows too: images, the patches that the encoder saw, and their reconstruction.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard
from transformers.training_args import OptimizerNames

from .. import ViTAEForPreTraining, ViTAEImageProcessor, config_from_preset
from ..data.augmentation import AugmentationArguments, DeviceNormalization, training_transform
from ..data.samples import collate
from ..data.sources import load_images
from ..hub.cards import TEMPLATES, pretraining_card
from ..training.arguments import ImageArguments, ViTAETrainingArguments
from ..training.reconstruction import DrawReconstructions, ReconstructionTrainer
from ..training.run import Task, exit_status, run_task
from ..training.splits import evaluation_images, find_stream, load_splits, training_images


@dataclass(kw_only=True)
class PretrainingArguments(ImageArguments):
    """What to pretrain on what images."""

    preset: str = field(metadata={"help": "A name of PRESETS with a class token."})
    eval_share: float = field(
        default=0.02, metadata={"help": "Share of the images to hold out where no split is there to evaluate."}
    )
    mask_ratio: float = field(default=0.75, metadata={"help": "Share of the patches to hide."})
    norm_pix_loss: bool = field(default=False, metadata={"help": "Predict pixels normalised by patch."})
    drop_path_rate: float = 0.0
    min_crop_scale: float = field(default=0.2, metadata={"help": "Smallest share of an image in a crop."})
    flip_prob: float = 0.5
    interpolation: str = "bicubic"
    pictures: int = field(default=8, metadata={"help": "How many evaluation images to draw."})

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"--pictures must be at least 1, got {self.pictures}")
        config_from_preset(self.preset)  # an unknown one is an error now, not after the data have been read


@dataclass
class Pretraining(Task[ReconstructionTrainer]):
    """A masked autoencoder of images without labels."""

    run: PretrainingArguments
    training: ViTAETrainingArguments

    command: ClassVar[str] = "vitae pretrain"
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "--label_smoothing_factor does not work here: there are no labels",
        "push_to_hub": "--push_to_hub does not work here: publish what was fine-tuned",
    }

    def build_model(self) -> ViTAEForPreTraining:
        size = {} if self.run.image_size is None else {"image_size": self.run.image_size}
        fields = {name: getattr(self.run, name) for name in ("mask_ratio", "norm_pix_loss", "drop_path_rate")}
        config: Any = config_from_preset(self.run.preset, conv_kernel_size=1, **size, **fields)
        return ViTAEForPreTraining(config)

    def build_trainer(self) -> ReconstructionTrainer:
        run, training = self.run, self.training
        shards = find_stream(run, training, labelled=False)
        splits = load_splits(run, training, load_images)
        model = self.build_model()
        processor = ViTAEImageProcessor(size=model.config.image_size, crop_pct=run.crop_pct)
        crops = {name: getattr(run, name) for name in ("min_crop_scale", "flip_prob", "interpolation")}
        augmentation = AugmentationArguments(auto_augment=None, color_jitter=0.0, **crops)
        transform = training_transform(model.config.image_height_width, augmentation)
        source = splits[run.train_split] if shards is None else shards
        trainer = ReconstructionTrainer(
            model,
            training,
            data_collator=collate,
            train_dataset=training_images(run, training, source, transform),
            eval_dataset=evaluation_images(run, splits[run.eval_split], processor),
            processing_class=processor,
            augmentation=DeviceNormalization(processor.image_mean, processor.image_std),
        )
        self.drawing: DrawReconstructions = self.draw_at_evaluations(trainer)
        return trainer

    def draw_at_evaluations(self, trainer: ReconstructionTrainer) -> DrawReconstructions:
        """The callback that draws the first evaluation images."""
        images, processor = trainer.eval_dataset, trainer.processing_class
        count = min(self.run.pictures, len(images))
        pixel_values = torch.stack([images[index]["pixel_values"] for index in range(count)])
        drawing = DrawReconstructions(trainer, pixel_values, processor.image_mean, processor.image_std)
        trainer.add_callback(drawing)
        return drawing

    def figures(self, trainer: ReconstructionTrainer, metrics: dict[str, float]) -> dict[str, Any]:
        return {"picture": str(self.drawing.path)}

    def draw(self, trainer: ReconstructionTrainer, record: dict[str, Any]) -> list[Path]:
        return [self.drawing.path]

    def settings(self, trainer: ReconstructionTrainer) -> dict[str, Any]:
        run, training = self.run, self.training
        optimizer = OptimizerNames(training.optim).value
        return {
            "optimizer": f"{optimizer}, betas {training.adam_beta1:g} and {training.adam_beta2:g}",
            "augmentation": f"crops of {run.min_crop_scale:g} to 1 of an image, mirrored ({run.flip_prob:.0%})",
        }

    def card(self, trainer: ReconstructionTrainer, record: dict[str, Any], **values: Any) -> ModelCard:
        model = trainer.model
        return pretraining_card(
            TEMPLATES / "pretraining.md",
            preset=self.run.preset,
            encoder_parameters=model.vitae.num_parameters(),
            decoder_parameters=sum(parameter.numel() for parameter in model.decoder.parameters()),
            size=model.config.image_size,
            mask_ratio=model.config.mask_ratio,
            norm_pix_loss=model.config.norm_pix_loss,
            loss=record["eval_loss"],
            picture=self.drawing.path.relative_to(self.training.output_dir),
            **values,
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run_task(Pretraining.parse(argv))


status = exit_status
