# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a network on images without labels, by letting it predict what is masked in them.

    vitae pretrain --config mae-b --dataset FOLDER --output_dir outputs/mae-b
    vitae train --config vitae-b --model_name_or_path outputs/mae-b --dataset LABELLED …

A variant with a class token becomes a masked autoencoder, whose encoder sees only the visible patches (MAE). All others
see the whole image, in which a colour covers the masked patches (SimMIM): recipe `mim-vitaev2-s`.
`--dataset` is a Hub name or a folder of images, in parquet files, tars or any folders; labels are not read. A recipe is
a YAML file of these arguments; the command line overrides it. The library's `TrainingArguments`,
`--resume_from_checkpoint last`, Ctrl-C and SIGTERM do what they do in `vitae train`. At the end the folder holds the
model, `eval_results.json`, `training_curves.png`, `reconstructions.png` and a model card, and in `reconstructions/` a
picture for each evaluation, which TensorBoard shows too: images, the patches that the network saw, and their
reconstruction. `--push_to_hub` then publishes what was evaluated.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedImageModeling, PreTrainedModel
from transformers.training_args import OptimizerNames

from .. import ViTAEForPreTraining, ViTAEImageProcessor, config_from_preset
from ..data.augmentation import AugmentationArguments, DeviceNormalization, training_transform
from ..data.samples import collate
from ..data.sources import load_images
from ..decoder_vitae import random_mask
from ..hub.cards import TEMPLATES, pretraining_card
from ..hub.publishing import publish
from ..training.arguments import ImageArguments, ViTAETrainingArguments
from ..training.reconstruction import DrawReconstructions, MaskedImageTrainer, ReconstructionTrainer
from ..training.run import SCHEDULE, Task, exit_status, run_task
from ..training.splits import evaluation_images, find_stream, load_splits, training_images


@dataclass(kw_only=True)
class PretrainingArguments(ImageArguments):
    """What to pretrain on what images."""

    preset: str = field(metadata={"help": "A name of PRESETS."})
    eval_share: float = field(
        default=0.02, metadata={"help": "Share of the images to hold out where no split is there to evaluate."}
    )
    mask_ratio: float | None = field(
        default=None, metadata={"help": "Share of the patches to hide; default: 0.75 with a class token, else 0.6."}
    )
    mask_patch_size: int | None = field(
        default=None, metadata={"help": "Without a class token: side in pixels of what to hide; default: 32."}
    )
    norm_pix_loss: bool = field(
        default=False, metadata={"help": "With a class token: predict pixels normalised by patch."}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Share of the paths to drop, in the last layer."})
    min_crop_scale: float = field(default=0.2, metadata={"help": "Smallest share of an image in a crop."})
    flip_prob: float = field(default=0.5, metadata={"help": "Probability to mirror an image."})
    interpolation: str = field(
        default="bicubic", metadata={"help": "bilinear, bicubic, or random: one of the two for each image."}
    )
    pictures: int = field(default=8, metadata={"help": "How many evaluation images to draw."})

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"--pictures must be at least 1, got {self.pictures}")
        config = config_from_preset(self.preset)  # an unknown one is an error now, not after the data have been read
        self.is_autoencoder: bool = config.has_class_token
        if self.mask_ratio is None:
            self.mask_ratio = 0.75 if self.is_autoencoder else 0.6
        if not self.is_autoencoder:
            self.mask_patch_size = 32 if self.mask_patch_size is None else self.mask_patch_size
            self._check_masks(self.image_size or config.image_size, config.patch_size)
        elif self.mask_patch_size is not None:
            raise ValueError(
                f"--mask_patch_size does not go with {self.preset}: a variant with a class token becomes a masked"
                f" autoencoder, which hides patches of its own, of {config.patch_size} pixels"
            )

    def _check_masks(self, image_size: Any, patch_size: int) -> None:
        side: Any = self.mask_patch_size
        ratio: Any = self.mask_ratio
        if self.norm_pix_loss:
            raise ValueError(
                f"--norm_pix_loss does not go with {self.preset}: a variant without a class token predicts pixels as"
                " they are"
            )
        if side < 1 or side % patch_size or image_size % side:
            raise ValueError(
                f"--mask_patch_size must divide the side of the images, {image_size}, and be a multiple of"
                f" {patch_size}, the patches of {self.preset}; got {side}"
            )
        random_mask(torch.zeros(1, (image_size // side) ** 2), ratio)  # which says if all or none are hidden


@dataclass
class Pretraining(Task[ReconstructionTrainer]):
    """A network that learns from images without labels: a masked autoencoder or a masked image model."""

    run: PretrainingArguments
    training: ViTAETrainingArguments

    command: ClassVar[str] = "vitae pretrain"
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "--label_smoothing_factor does not work here: there are no labels"
    }
    idle: ClassVar[dict[str, str]] = SCHEDULE

    def build_model(self) -> PreTrainedModel:
        run = self.run
        fields: dict[str, Any] = {"drop_path_rate": run.drop_path_rate}
        if run.image_size is not None:
            fields["image_size"] = run.image_size
        if not run.is_autoencoder:
            return AutoModelForMaskedImageModeling.from_config(config_from_preset(run.preset, **fields))
        fields |= {"conv_kernel_size": 1, "mask_ratio": run.mask_ratio, "norm_pix_loss": run.norm_pix_loss}
        config: Any = config_from_preset(run.preset, **fields)
        return ViTAEForPreTraining(config)

    def build_trainer(self) -> ReconstructionTrainer:
        run, training = self.run, self.training
        shards = find_stream(run, training, labelled=False)
        splits = load_splits(run, training, load_images)
        model = self.build_model()
        processor = ViTAEImageProcessor(size=model.config.image_size, crop_pct=run.crop_pct)
        processor.validate()  # before the training, not after it
        crops = {name: getattr(run, name) for name in ("min_crop_scale", "flip_prob", "interpolation")}
        augmentation = AugmentationArguments(auto_augment=None, color_jitter=0.0, **crops)
        transform = training_transform(model.config.image_height_width, augmentation)
        source = splits[run.train_split] if shards is None else shards
        masks: dict[str, Any] = {}
        if not run.is_autoencoder:
            masks = {"mask_patch_size": run.mask_patch_size, "mask_ratio": run.mask_ratio}
        trainer = (ReconstructionTrainer if run.is_autoencoder else MaskedImageTrainer)(
            model,
            training,
            **masks,
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
        """`reconstructions.png`, the picture of the last evaluation."""
        return [Path(shutil.copy(self.drawing.path, Path(self.training.output_dir) / "reconstructions.png"))]

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
            is_autoencoder=self.run.is_autoencoder,
            encoder_parameters=model.base_model.num_parameters(),
            decoder_parameters=sum(parameter.numel() for parameter in model.decoder.parameters()),
            size=model.config.image_size,
            mask_ratio=self.run.mask_ratio,
            mask_patch_size=trainer.mask_patch_size,
            norm_pix_loss=self.run.norm_pix_loss,
            loss=record["eval_loss"],
            **values,
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run_task(Pretraining.parse(argv), publish)


status = exit_status
