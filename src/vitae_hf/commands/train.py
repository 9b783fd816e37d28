# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a ViTAE classifier, from scratch or from a model, on labelled images.

    vitae train --config vitae-t --dataset ILSVRC/imagenet-1k --output_dir outputs/vitae-t
    vitae train --model_name_or_path outputs/vitae-t --dataset FOLDER --output_dir outputs/mine

`--dataset` is a Hub name or a folder: parquet files, or one folder of images for each class. A recipe is a YAML file
of these arguments; what is written behind it on the command line counts more. Every argument of the library's
`TrainingArguments` works. `--resume_from_checkpoint last` continues from the newest whole checkpoint of the output
folder, or begins where there is none; SIGTERM saves one and exits with status 143. At the end the folder holds the
model, `ema/` with the averaged weights if there are any (then these are evaluated), `eval_results.json`,
`training_curves.png` and a model card; TensorBoard's files are in `runs/` (`--report_to trackio`, `none` and others
work too). `--push_to_hub` then publishes what was evaluated, as `vitae push` does.
"""

import dataclasses
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification, EvalPrediction, set_seed

from .. import ViTAEImageProcessor, config_from_preset
from ..data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss, training_transform
from ..data.samples import IGNORED_LABEL, ImageDataset, collate, evaluation_pixels
from ..data.shards import Shards, StreamedImageDataset, find_shards
from ..data.sources import (
    class_names,
    draw_by_class,
    find_data_files,
    hold_out,
    load_labelled_images,
    pick_split,
    read_class_names,
)
from ..environment import environment
from ..evaluation.metrics import TopKAccuracy
from ..failures import about
from ..files import PICTURES, find_model
from ..hub.cards import TEMPLATES, draw_curves, model_card
from ..hub.publishing import publish
from ..training.arguments import parse_arguments
from ..training.checkpoints import last_checkpoint
from ..training.trainer import ViTAETrainer, ViTAETrainingArguments


HELD_OUT = "held_out"


@dataclasses.dataclass
class RunArguments:
    """What to train on what."""

    dataset: str = dataclasses.field(metadata={"help": "Hub name or local folder of labelled images."})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration, if several."})
    train_split: str = "train"
    train_share: float = dataclasses.field(
        default=1.0, metadata={"help": "Train on this share of every class, drawn with `data_seed` or `seed`."}
    )
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "Default: validation, else test, else a part held out of the training images."}
    )
    eval_share: float = dataclasses.field(
        default=0.1, metadata={"help": "How much of every class is held out where there is no split to evaluate."}
    )
    preset: str | None = dataclasses.field(default=None, metadata={"help": "From scratch: a name of PRESETS."})
    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "Fine-tuning: what to begin with."}
    )
    image_size: int | None = dataclasses.field(default=None, metadata={"help": "Side in pixels; default: the model's."})
    crop_pct: float = dataclasses.field(default=0.9, metadata={"help": "Crop ratio of the evaluation."})
    drop_path_rate: float | None = dataclasses.field(default=None, metadata={"help": "Default: the model's."})
    hidden_dropout_prob: float | None = dataclasses.field(default=None, metadata={"help": "Default: the model's."})
    base_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Sets learning_rate to this times global batch / 512."}
    )
    base_ema_decay: float | None = dataclasses.field(
        default=None, metadata={"help": "Sets ema_decay to this to the power of global batch / 512; 0: no average."}
    )
    class_names: Path | None = dataclasses.field(
        default=None, metadata={"help": "Text file with a class on each line, for data whose labels are only numbers."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read training images from parquet or tar shards as they come."}
    )
    shuffle_buffer: int = dataclasses.field(
        default=1000, metadata={"help": "Streaming: images that each worker holds to draw the next one from."}
    )
    on_bad_sample: Literal["error", "skip"] = dataclasses.field(
        default="error", metadata={"help": "Whether an unreadable picture is an error, or skipped and counted."}
    )

    def __post_init__(self):
        if (self.preset is None) == (self.model_name_or_path is None):
            raise ValueError("give either --preset, to train from scratch, or --model_name_or_path, to fine-tune")
        if not 0 < self.train_share <= 1:
            raise ValueError(f"--train_share must be above 0 and at most 1, got {self.train_share}")
        if self.train_share < 1 and self.streaming:
            raise ValueError("--train_share draws from all images; it does not go with --streaming")


def parse(argv: list[str] | None):
    """Arguments from the command line over those of `--config`, as (run, augmentation, training)."""
    classes = (RunArguments, AugmentationArguments, ViTAETrainingArguments)
    run, augmentation, training = parse_arguments(argv, classes, "vitae train", __doc__)
    if run.base_ema_decay:
        training.ema_decay = run.base_ema_decay ** (training.global_batch_size / 512)
    if training.label_smoothing_factor:
        raise ValueError("smooth labels by --label_smoothing, not --label_smoothing_factor")
    return run, augmentation, training


def build_model(run: RunArguments, names: dict[int, str]):
    """A new model of a preset, or a trained one with a head for these classes."""
    overrides = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    rates = {"drop_path_rate": run.drop_path_rate, "hidden_dropout_prob": run.hidden_dropout_prob}
    overrides |= {name: rate for name, rate in rates.items() if rate is not None}
    if run.preset is not None:
        size = {} if run.image_size is None else {"image_size": run.image_size}
        return AutoModelForImageClassification.from_config(config_from_preset(run.preset, **size, **overrides))
    with about(run.model_name_or_path):
        model = AutoModelForImageClassification.from_pretrained(
            find_model(run.model_name_or_path), ignore_mismatched_sizes=True, **overrides
        )
    if run.image_size not in (None, model.config.image_size):
        model.resize_position_embeddings(run.image_size)
    return model


def load_splits(run: RunArguments, training: ViTAETrainingArguments, names: list[str] | None):
    """The data set, whole, or under `--streaming` without the training images."""
    present = find_data_files(run.dataset, run.dataset_name)
    run.train_split = pick_split(present, run.train_split)
    if run.eval_split is None and not {"validation", "test"} & present.keys() and not run.streaming:
        run.eval_split = HELD_OUT
    else:
        run.eval_split = pick_split(present, *([run.eval_split] if run.eval_split else ("validation", "test")))
    wanted = {run.train_split, run.eval_split} - ({run.train_split} if run.streaming else {HELD_OUT})
    splits = load_labelled_images(run.dataset, run.dataset_name, sorted(wanted), names)
    if run.eval_split == HELD_OUT:
        parts = hold_out(splits[run.train_split], run.eval_share, training.data_seed)
        splits[run.train_split], splits[HELD_OUT] = parts
    if run.train_share < 1:
        drawn, _ = draw_by_class(splits[run.train_split], run.train_share, training.data_seed, "--train_share")
        splits[run.train_split] = drawn
    return splits


def load_shards(run: RunArguments, training: ViTAETrainingArguments, names: list[str] | None) -> Shards | None:
    """Under `--streaming`, the training images; one process counts rows for all."""
    if not run.streaming:
        return None
    shards = [None]
    if training.process_index == 0:
        shards = [find_shards(run.dataset, run.dataset_name, run.train_split, names=names)]
    return broadcast_object_list(shards)[0]


def build_training_data(run: RunArguments, training: ViTAETrainingArguments, splits, shards, transform):
    options = {"on_bad_sample": run.on_bad_sample, "seed": training.seed}
    if shards is None:
        return ImageDataset(splits[run.train_split], transform, **options)
    return StreamedImageDataset(
        shards,
        transform,
        training.train_batch_size,
        shuffle_buffer=run.shuffle_buffer,
        drop_last=training.dataloader_drop_last,
        num_labels=len(class_names(splits)),
        rank=training.process_index,
        world_size=training.world_size,
        **options,
    )


def build_trainer(run: RunArguments, augmentation: AugmentationArguments, training: ViTAETrainingArguments):
    names = read_class_names(run.class_names) if run.class_names else None
    shards = load_shards(run, training, names)
    if shards is not None and shards.classes is not None:
        names = list(shards.classes)
    with training.main_process_first(desc="data"):
        splits = load_splits(run, training, names)
    model = build_model(run, class_names(splits))
    processor = ViTAEImageProcessor(size=model.config.image_size, crop_pct=run.crop_pct)
    transform = training_transform(model.config.image_size, augmentation)
    return ViTAETrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=build_training_data(run, training, splits, shards, transform),
        eval_dataset=ImageDataset(
            splits[run.eval_split],
            partial(evaluation_pixels, processor),
            run.on_bad_sample,
            drop_bad=True,
        ),
        processing_class=processor,
        compute_loss_func=soft_target_loss,
        compute_metrics=accuracy,
        augmentation=DeviceAugmentation(model.config.num_labels, augmentation),
    )


def accuracy(result: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 of the pictures that could be read."""
    rated = result.label_ids != IGNORED_LABEL
    return TopKAccuracy().compute(predictions=result.predictions[rated], references=result.label_ids[rated])


def write_reports(trainer: ViTAETrainer, run: RunArguments, record: dict) -> None:
    """`training_curves.png` and the model card, beside the model and in the folder of the averaged weights."""
    training, config, output = trainer.args, trainer.model.config, Path(trainer.args.output_dir)
    draw_curves(trainer.state.log_history, output / "training_curves.png")
    seen = getattr(trainer.train_dataset, "total", len(trainer.train_dataset))
    settings = {
        "optimizer": training.optim.value,
        "learning rate": f"{training.learning_rate:g}",
        "weight decay": f"{training.weight_decay:g}",
        "epochs": round(trainer.state.epoch, 2),
        "updates": trainer.state.global_step,
        "global batch": training.global_batch_size,
        "average of the weights": training.ema_decay or "none",
        "augmentation": ", ".join(f"{name} {value}" for name, value in vars(trainer.augmentation.arguments).items()),
        "drop path": getattr(config, "drop_path_rate", "none"),
        "seed": training.seed,
    }
    card = model_card(
        TEMPLATES / "trained.md",
        model_name=output.name,
        architecture=type(trainer.model).__name__,
        parameters=trainer.model.num_parameters(),
        num_labels=config.num_labels,
        origin="trained from scratch" if run.preset else f"fine-tuned from `{run.model_name_or_path}`",
        dataset=run.dataset,
        train_images=f"{seen:,}",
        eval_split=record["eval_split"],
        eval_images=f"{len(trainer.eval_dataset):,}",
        size=config.image_size,
        crop_pct=run.crop_pct,
        image_mean=trainer.processing_class.image_mean,
        image_std=trainer.processing_class.image_std,
        averaged=trainer.ema is not None,
        metrics={"top1": record["top1_percent"], "top5": record["top5_percent"], "loss": record["eval_loss"]},
        skipped=record["skipped"],
        settings=settings,
        environment=", ".join(f"{name} {record[name]}" for name in ("device", "torch", "transformers", "date")),
    )
    card.save(output / "README.md")
    if trainer.ema is not None:
        card.save(output / "ema" / "README.md")
        shutil.copy(output / "training_curves.png", output / "ema")


def take_over_pushing(training: ViTAETrainingArguments) -> bool:
    """Whether to publish in the end, and if so, make the repository: better to fail now than after the training.

    The Trainer itself then pushes nothing: it would upload logs and pickles, and both kinds of weights into one place.
    """
    wanted, training.push_to_hub = training.push_to_hub, False
    if wanted and training.should_save:
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        with about(name):
            api = HfApi(token=training.hub_token)
            made = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        training.hub_model_id = made.repo_id
    return wanted


def push(training: ViTAETrainingArguments, folder: str) -> dict:
    with about(training.hub_model_id):
        return publish(
            Path(folder), training.hub_model_id, PICTURES[0], token=training.hub_token, revision=training.hub_revision
        )


def main(argv: list[str] | None = None) -> dict:
    run, augmentation, training = parse(argv)
    if training.resume_from_checkpoint is None and (earlier := last_checkpoint(training.output_dir)):
        raise ValueError(
            f"{earlier} is of an earlier run: continue it by --resume_from_checkpoint last, or choose another"
            " --output_dir"
        )
    is_published = take_over_pushing(training)
    set_seed(training.seed)
    trainer = build_trainer(run, augmentation, training)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.stop.received and trainer.state.global_step < trainer.state.max_steps:
        checkpoint = last_checkpoint(training.output_dir)
        return {"stopped_at_step": trainer.state.global_step, "checkpoint": str(checkpoint), **environment()}
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    output = Path(training.output_dir)
    skipped = torch.tensor(trainer.train_dataset.skipped + trainer.eval_dataset.skipped, device=training.device)
    record = {
        "model": str(output / "ema" if trainer.ema is not None else output),
        "eval_split": run.eval_split,
        "top1_percent": round(metrics["eval_top1"], 3),
        "top5_percent": round(metrics["eval_top5"], 3),
        "eval_loss": round(metrics["eval_loss"], 4),
        "images_per_s": trainer.throughput.images_per_s and round(trainer.throughput.images_per_s, 1),
        "learning_rate": training.learning_rate,
        "skipped": int(trainer.accelerator.reduce(skipped)),
        "seed": training.seed,
        **environment(training.device.type),
    }
    if training.should_save:
        write_reports(trainer, run, record)
        if is_published:
            record |= push(training, record["model"])
    return record


def status(record: dict) -> int:
    return 128 + signal.SIGTERM if "stopped_at_step" in record else 0
