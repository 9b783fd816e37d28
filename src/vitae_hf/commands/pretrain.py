# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a class-token variant as a masked autoencoder, on images without labels.

    vitae pretrain --config mae-b --dataset FOLDER --output_dir outputs/mae-b
    vitae train --config vitae-b --model_name_or_path outputs/mae-b --dataset LABELLED …

`--dataset` is a Hub name or a folder of images, in parquet files, tars or any folders; labels are not read. A recipe is
a YAML file of these arguments; what is written behind it on the command line counts more. Every argument of the
library's `TrainingArguments` works, and `--resume_from_checkpoint last` and SIGTERM do what they do in
`vitae train`. At the end the folder holds the model, `eval_results.json`, `training_curves.png`, a model card, and
in `reconstructions/` a picture for each evaluation, which TensorBoard shows too: images, what the encoder saw of them,
and what it made of it.
"""

import dataclasses
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from .. import ViTAEForPreTraining, ViTAEImageProcessor, config_from_preset
from ..data.augmentation import AugmentationArguments, DeviceNormalization, training_transform
from ..data.samples import ImageDataset, collate, evaluation_pixels
from ..data.shards import StreamedImageDataset, find_shards
from ..data.sources import find_data_files, hold_out, load_images, pick_split
from ..environment import environment
from ..hub.cards import TEMPLATES, draw_curves, pretraining_card
from ..training.arguments import parse_arguments
from ..training.checkpoints import last_checkpoint
from ..training.reconstruction import DrawReconstructions
from ..training.trainer import ViTAEPreTrainer, ViTAETrainingArguments


HELD_OUT = "held_out"


@dataclasses.dataclass
class RunArguments:
    """What to pretrain on what."""

    dataset: str = dataclasses.field(metadata={"help": "Hub name or local folder of images."})
    preset: str = dataclasses.field(metadata={"help": "A name of PRESETS with a class token."})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration, if several."})
    train_split: str = "train"
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "Default: validation, else test, else a part held out of the training images."}
    )
    eval_share: float = dataclasses.field(
        default=0.02, metadata={"help": "How much is held out where there is no split to evaluate."}
    )
    image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Side in pixels; default: the preset's."}
    )
    crop_pct: float = dataclasses.field(default=0.9, metadata={"help": "Crop ratio of the evaluation."})
    mask_ratio: float = dataclasses.field(default=0.75, metadata={"help": "Share of the patches to hide."})
    norm_pix_loss: bool = dataclasses.field(default=False, metadata={"help": "Predict pixels normalised by patch."})
    drop_path_rate: float = 0.0
    base_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Sets learning_rate to this times global batch / 512."}
    )
    min_crop_scale: float = dataclasses.field(default=0.2, metadata={"help": "Smallest share of an image in a crop."})
    flip_prob: float = 0.5
    interpolation: str = "bicubic"
    pictures: int = dataclasses.field(default=8, metadata={"help": "How many evaluation images to draw."})
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read training images from parquet or tar shards as they come."}
    )
    shuffle_buffer: int = dataclasses.field(
        default=1000, metadata={"help": "Streaming: images that each worker holds to draw the next one from."}
    )
    on_bad_sample: Literal["error", "skip"] = dataclasses.field(
        default="error", metadata={"help": "Whether an unreadable picture is an error, or skipped and counted."}
    )


def parse(argv: list[str] | None):
    """Arguments from the command line over those of `--config`, as (run, training)."""
    run, training = parse_arguments(argv, (RunArguments, ViTAETrainingArguments), "vitae pretrain", __doc__)
    if run.pictures < 1:
        raise ValueError(f"--pictures must be at least 1, got {run.pictures}")
    if training.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor does not work here: there are no labels")
    if training.push_to_hub:
        raise ValueError("--push_to_hub does not work here: publish what was fine-tuned")
    training.label_names = ["pixel_values"]  # an evaluation has a loss without labels
    return run, training


def build_model(run: RunArguments) -> ViTAEForPreTraining:
    size = {} if run.image_size is None else {"image_size": run.image_size}
    names = ("mask_ratio", "norm_pix_loss", "drop_path_rate")
    fields = {name: getattr(run, name) for name in names}
    return ViTAEForPreTraining(config_from_preset(run.preset, conv_kernel_size=1, **size, **fields))


def load_splits(run: RunArguments, training: ViTAETrainingArguments):
    """The images, whole, or under `--streaming` without the training images."""
    present = find_data_files(run.dataset, run.dataset_name)
    run.train_split = pick_split(present, run.train_split)
    if run.eval_split is None and not {"validation", "test"} & present.keys() and not run.streaming:
        run.eval_split = HELD_OUT
    else:
        run.eval_split = pick_split(present, *([run.eval_split] if run.eval_split else ("validation", "test")))
    wanted = {run.train_split, run.eval_split} - ({run.train_split} if run.streaming else {HELD_OUT})
    splits = load_images(run.dataset, run.dataset_name, sorted(wanted))
    if run.eval_split == HELD_OUT:
        parts = hold_out(splits[run.train_split], run.eval_share, training.data_seed)
        splits[run.train_split], splits[HELD_OUT] = parts
    return splits


def build_training_data(run: RunArguments, training: ViTAETrainingArguments, splits, transform):
    options = {"on_bad_sample": run.on_bad_sample, "seed": training.seed}
    if not run.streaming:
        return ImageDataset(splits[run.train_split], transform, **options)
    shards = [None]
    if training.process_index == 0:  # which counts rows for all
        shards = [find_shards(run.dataset, run.dataset_name, run.train_split, labelled=False)]
    return StreamedImageDataset(
        broadcast_object_list(shards)[0],
        transform,
        training.train_batch_size,
        shuffle_buffer=run.shuffle_buffer,
        drop_last=training.dataloader_drop_last,
        rank=training.process_index,
        world_size=training.world_size,
        **options,
    )


def build_trainer(run: RunArguments, training: ViTAETrainingArguments) -> ViTAEPreTrainer:
    with training.main_process_first(desc="data"):
        splits = load_splits(run, training)
    model = build_model(run)
    processor = ViTAEImageProcessor(size=model.config.image_size, crop_pct=run.crop_pct)
    crops = {name: getattr(run, name) for name in ("min_crop_scale", "flip_prob", "interpolation")}
    augmentation = AugmentationArguments(auto_augment=None, color_jitter=0.0, **crops)
    transform = training_transform(model.config.image_size, augmentation)
    return ViTAEPreTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=build_training_data(run, training, splits, transform),
        eval_dataset=ImageDataset(
            splits[run.eval_split], partial(evaluation_pixels, processor), on_bad_sample=run.on_bad_sample
        ),
        processing_class=processor,
        augmentation=DeviceNormalization(processor.image_mean, processor.image_std),
    )


def draw_at_evaluations(trainer: ViTAEPreTrainer, count: int) -> DrawReconstructions:
    """The callback that draws the first evaluation images."""
    images = trainer.eval_dataset
    pixel_values = torch.stack([images[index]["pixel_values"] for index in range(min(count, len(images)))])
    processor = trainer.processing_class
    drawing = DrawReconstructions(trainer, pixel_values, processor.image_mean, processor.image_std)
    trainer.add_callback(drawing)
    return drawing


def write_reports(trainer: ViTAEPreTrainer, run: RunArguments, record: dict) -> None:
    """`training_curves.png` and the model card."""
    training, model, output = trainer.args, trainer.model, Path(trainer.args.output_dir)
    draw_curves(trainer.state.log_history, output / "training_curves.png")
    seen = getattr(trainer.train_dataset, "total", len(trainer.train_dataset))
    settings = {
        "optimizer": f"{training.optim.value}, betas {training.adam_beta1:g} and {training.adam_beta2:g}",
        "learning rate": f"{training.learning_rate:g}",
        "weight decay": f"{training.weight_decay:g}",
        "epochs": round(trainer.state.epoch, 2),
        "updates": trainer.state.global_step,
        "global batch": training.global_batch_size,
        "augmentation": f"crops of {run.min_crop_scale:g} to 1 of an image, mirrored ({run.flip_prob:.0%})",
        "seed": training.seed,
    }
    card = pretraining_card(
        TEMPLATES / "pretraining.md",
        model_name=output.name,
        preset=run.preset,
        encoder_parameters=model.vitae.num_parameters(),
        decoder_parameters=sum(parameter.numel() for parameter in model.decoder.parameters()),
        dataset=run.dataset,
        train_images=f"{seen:,}",
        eval_split=run.eval_split,
        eval_images=f"{len(trainer.eval_dataset):,}",
        size=model.config.image_size,
        mask_ratio=model.config.mask_ratio,
        norm_pix_loss=model.config.norm_pix_loss,
        loss=record["eval_loss"],
        picture=Path(record["picture"]).relative_to(output),
        skipped=record["skipped"],
        settings=settings,
        environment=", ".join(f"{name} {record[name]}" for name in ("device", "torch", "transformers", "date")),
    )
    for folder in [output] if trainer.ema is None else [output, output / "ema"]:  # the figures are the average's
        card.save(folder / "README.md")
        if folder != output:
            for name in ("training_curves.png", Path(record["picture"]).relative_to(output)):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(output / name, folder / name)


def main(argv: list[str] | None = None) -> dict:
    run, training = parse(argv)
    if training.resume_from_checkpoint is None and (earlier := last_checkpoint(training.output_dir)):
        raise ValueError(
            f"{earlier} is of an earlier run: continue it by --resume_from_checkpoint last, or choose another"
            " --output_dir"
        )
    set_seed(training.seed)
    trainer = build_trainer(run, training)
    drawing = draw_at_evaluations(trainer, run.pictures)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.stop.received and trainer.state.global_step < trainer.state.max_steps:
        checkpoint = last_checkpoint(training.output_dir)
        return {"stopped_at_step": trainer.state.global_step, "checkpoint": str(checkpoint), **environment()}
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    skipped = torch.tensor(trainer.train_dataset.skipped + trainer.eval_dataset.skipped, device=training.device)
    record = {
        "model": training.output_dir if trainer.ema is None else str(Path(training.output_dir, "ema")),
        "picture": str(drawing.path),
        "eval_split": run.eval_split,
        "eval_loss": round(metrics["eval_loss"], 4),
        "images_per_s": trainer.throughput.images_per_s and round(trainer.throughput.images_per_s, 1),
        "learning_rate": training.learning_rate,
        "skipped": int(trainer.accelerator.reduce(skipped)),
        "seed": training.seed,
        **environment(training.device.type),
    }
    if training.should_save:
        write_reports(trainer, run, record)
    return record


def status(record: dict) -> int:
    return 128 + signal.SIGTERM if "stopped_at_step" in record else 0
