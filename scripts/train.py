# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a ViTAE classifier, from scratch or from a model, on labelled images.

    python scripts/train.py --config recipes/vitae-t.yaml --dataset ILSVRC/imagenet-1k --output_dir outputs/vitae-t
    python scripts/train.py --model_name_or_path outputs/vitae-t --dataset FOLDER --output_dir outputs/mine

`--dataset` is a Hub name or a folder: parquet files, or one folder of images for each class. A recipe is a YAML file of
these arguments; what is written behind it on the command line counts more. Every argument of the library's
`TrainingArguments` works, `--resume_from_checkpoint` among them. At the end the folder holds the model, `ema/` with the
averaged weights if there are any (then these are evaluated), `eval_results.json` and `training_curves.png`.
"""

import dataclasses
import json
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import yaml
from transformers import AutoConfig, AutoModelForImageClassification, EvalPrediction, HfArgumentParser, set_seed

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessor, config_from_preset
from vitae_hf.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss, training_transform
from vitae_hf.data import IGNORED_LABEL, LabelledImages, class_names, collate, load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.metrics import TopKAccuracy
from vitae_hf.optimization import scaled_learning_rate
from vitae_hf.trainer import ViTAETrainer, ViTAETrainingArguments


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class RunArguments:
    """What to train on what."""

    dataset: str = dataclasses.field(metadata={"help": "Hub name or local folder of labelled images."})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration, if several."})
    train_split: str = "train"
    train_share: float = dataclasses.field(
        default=1.0, metadata={"help": "Train on this share of the split, drawn by class with `data_seed` or `seed`."}
    )
    eval_split: str | None = dataclasses.field(default=None, metadata={"help": "Default: validation, else test."})
    preset: str | None = dataclasses.field(default=None, metadata={"help": "From scratch: a name of PRESETS."})
    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "Fine-tuning: what to begin with."}
    )
    image_size: int | None = dataclasses.field(default=None, metadata={"help": "Side in pixels; default: the model's."})
    crop_pct: float = dataclasses.field(default=0.9, metadata={"help": "Crop ratio of the evaluation."})
    drop_path_rate: float | None = dataclasses.field(default=None, metadata={"help": "Default: the model's."})
    base_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Sets learning_rate to this times global batch / 512."}
    )
    on_bad_sample: Literal["error", "skip"] = dataclasses.field(
        default="error", metadata={"help": "Whether an unreadable picture is an error, or skipped and counted."}
    )

    def __post_init__(self):
        if (self.preset is None) == (self.model_name_or_path is None):
            raise ValueError("give either --preset, to train from scratch, or --model_name_or_path, to fine-tune")
        if not 0 < self.train_share <= 1:
            raise ValueError(f"--train_share must be above 0 and at most 1, got {self.train_share}")


def parse(argv: list[str] | None):
    """Arguments from the command line over those of `--config`, as (run, augmentation, training)."""
    parser = HfArgumentParser((RunArguments, AugmentationArguments, ViTAETrainingArguments), description=__doc__)
    parser.add_argument("--config", type=Path, help="recipe: a YAML file of these arguments")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"), None)
    if config is not None:
        recipe = yaml.safe_load(Path(config).read_text())
        recipe.pop("about", None)
        known = {action.dest for action in parser._actions}
        for name in recipe.keys() - known:
            closest = get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"{config}: there is no argument {name!r}; did you mean {closest!r}?")
        parser.set_defaults(**recipe)
        for action in parser._actions:
            action.required = action.required and action.dest not in recipe
    run, augmentation, training, _ = parser.parse_args_into_dataclasses(argv)
    if run.base_learning_rate is not None:
        batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        training.learning_rate = scaled_learning_rate(run.base_learning_rate, batch)
    training.remove_unused_columns = False
    return run, augmentation, training


def build_model(run: RunArguments, names: dict[int, str]):
    """A new model of a preset, or a trained one with a head for these classes."""
    overrides = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    overrides |= {
        name: getattr(run, name) for name in ("image_size", "drop_path_rate") if getattr(run, name) is not None
    }
    if run.preset is not None:
        return ViTAEForImageClassification(config_from_preset(run.preset, **overrides))
    config = AutoConfig.from_pretrained(run.model_name_or_path)
    if getattr(config, "has_class_token", False) and run.image_size not in (None, config.image_size):
        raise ValueError(
            f"{run.model_name_or_path} has positions for {config.image_size} pixels; fine-tuning a class-token variant"
            f" at another size ({run.image_size}) is not supported"
        )
    return AutoModelForImageClassification.from_pretrained(
        run.model_name_or_path, ignore_mismatched_sizes=True, **overrides
    )


def build_trainer(run: RunArguments, augmentation: AugmentationArguments, training: ViTAETrainingArguments):
    with training.main_process_first(desc="data"):
        splits = load_labelled_images(run.dataset, run.dataset_name)
    eval_split = run.eval_split or next((name for name in ("validation", "test") if name in splits), None)
    for split in (run.train_split, eval_split):
        if split not in splits:
            raise ValueError(f"{run.dataset} has no split {split!r} to train on or evaluate; it has {list(splits)}")
    train_split = splits[run.train_split]
    if run.train_share < 1:
        seed = training.seed if training.data_seed is None else training.data_seed
        train_split = train_split.train_test_split(train_size=run.train_share, stratify_by_column="label", seed=seed)[
            "train"
        ]
    model = build_model(run, class_names(splits))
    processor = ViTAEImageProcessor(size=model.config.image_size, crop_pct=run.crop_pct)
    return ViTAETrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=LabelledImages(
            train_split,
            training_transform(model.config.image_size, augmentation),
            run.on_bad_sample,
            seed=training.seed,
        ),
        eval_dataset=LabelledImages(
            splits[eval_split],
            lambda picture: processor(picture, return_tensors="pt").pixel_values[0],
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


def draw_curves(log_history: list[dict], path: Path) -> None:
    """Loss, accuracy and learning rate over epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    curves = {
        "loss": ("loss", "eval_loss"),
        "accuracy (%)": ("eval_top1", "eval_top5"),
        "learning rate": ("learning_rate",),
    }
    for axis, (title, keys) in zip(axes, curves.items()):
        for key in keys:
            points = [(entry["epoch"], float(entry[key])) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict:
    run, augmentation, training = parse(argv)
    set_seed(training.seed)
    trainer = build_trainer(run, augmentation, training)
    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    output = Path(training.output_dir)
    skipped = torch.tensor(trainer.train_dataset.skipped + trainer.eval_dataset.skipped, device=training.device)
    if training.should_save:
        draw_curves(trainer.state.log_history, output / "training_curves.png")
    return {
        "model": str(output / "ema" if trainer.ema is not None else output),
        "top1_percent": round(metrics["eval_top1"], 3),
        "top5_percent": round(metrics["eval_top5"], 3),
        "eval_loss": round(metrics["eval_loss"], 4),
        "images_per_s": round(trained.metrics["train_samples_per_second"], 1),
        "learning_rate": training.learning_rate,
        "skipped": int(trainer.accelerator.reduce(skipped)),
        "seed": training.seed,
        **environment(training.device.type),
    }


if __name__ == "__main__":
    record = main()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(record))
