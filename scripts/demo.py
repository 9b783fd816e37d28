# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does the whole path work here? Trains `vitae-nano` on real images, then uses it as any Transformers user would.

    python scripts/demo.py          # about three minutes on two cores; `make demo` installs what it needs first

Reads 6,000 Fashion-MNIST images from `examples/fashion_mnist_mini`, trains with the Trainer, saves a folder, reloads it
with `AutoModelForImageClassification`, measures its accuracy on 1,000 test images, classifies some of them with
`pipeline`, and draws these with their three likeliest labels. The folder gets a model card, as publishing it takes.

The package carries one such model, `vitae-nano-fashion`. To renew it, run this in the root of the repository:

    python scripts/demo.py --asset src/vitae_hf/assets/vitae-nano-fashion
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import matplotlib
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessorPil, config_from_preset
from vitae_hf.environment import environment
from vitae_hf.evaluation.metrics import TopKAccuracy
from vitae_hf.failures import run_command
from vitae_hf.hub.cards import TEMPLATES, model_card
from vitae_hf.hub.checksums import write_sums
from vitae_hf.training.curves import draw_curves


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / "examples" / "fashion_mnist_mini"
LICENCE_OF_DATA = """The images are of
[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist), copyright 2017 Zalando SE, under the MIT licence; the
weights were trained on nothing else."""


def preprocess(split: Dataset, processor, batch_size: int = 500) -> list[dict[str, torch.Tensor]]:
    """All images of a split as the network sees them, in memory: 64×64 pixels, normalised."""
    batches = (split[start : start + batch_size]["image"] for start in range(0, len(split), batch_size))
    pixels = torch.cat([processor(images, return_tensors="pt").pixel_values for images in batches])
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, split["label"])]


def augment(samples: list[dict], max_shift: int = 3) -> dict[str, torch.Tensor]:
    """A training batch: each image mirrored or not, and shifted by up to `max_shift` pixels."""
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples])  # (B, 3, 64, 64)
    mirrored = torch.rand(len(samples)) < 0.5
    pixel_values[mirrored] = pixel_values[mirrored].flip(-1)
    side = pixel_values.shape[-1]
    padded = torch.nn.functional.pad(pixel_values, [max_shift] * 4, mode="replicate")
    corners = torch.randint(0, 2 * max_shift + 1, (len(samples), 2)).tolist()
    crops = [image[:, top : top + side, left : left + side] for image, (top, left) in zip(padded, corners)]
    return {"pixel_values": torch.stack(crops), "labels": torch.tensor([sample["labels"] for sample in samples])}


def train(data, output: Path, arguments: argparse.Namespace) -> Trainer:
    """Train from scratch and save model, configuration, image processor and code in `output`."""
    labels = data["train"].features["label"].names
    config = config_from_preset(
        "vitae-nano", id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
    )
    processor = ViTAEImageProcessorPil(size=64, crop_pct=1.0)
    training_arguments = TrainingArguments(
        output_dir=output,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=64,
        learning_rate=arguments.learning_rate,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        label_smoothing_factor=0.1,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=arguments.seed,
    )
    trainer = Trainer(
        ViTAEForImageClassification(config),
        training_arguments,
        data_collator=augment,
        train_dataset=preprocess(data["train"], processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


@torch.no_grad()
def evaluate(folder: Path, split: Dataset, batch_size: int = 250) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the loss, of the saved folder, loaded as its users load it."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    samples = preprocess(split, AutoImageProcessor.from_pretrained(folder))
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
    logits = torch.cat([model(batch).logits for batch in pixel_values.split(batch_size)])
    labels = torch.tensor(split["label"])
    top = TopKAccuracy().compute(predictions=logits.numpy(), references=labels.numpy())
    return {**top, "loss": torch.nn.functional.cross_entropy(logits, labels).item()}


def build_card(
    trainer: Trainer, data, metrics: dict[str, float], name: str, licence: str, is_carried: bool
) -> ModelCard:
    """The card of the trained model.

    Args:
        metrics: of [`evaluate`].
        name: of the model.
        licence: what the card says about the licence of data and weights.
        is_carried: whether the package carries the model: the card then says how it is found by its name.
    """
    training, model, processor = trainer.args, trainer.model, trainer.processing_class
    found = environment()
    return model_card(
        TEMPLATES / "trained.md",
        model_name=name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        num_labels=model.config.num_labels,
        origin="trained from scratch by `scripts/demo.py` of the repository",
        dataset=os.path.relpath(DATA),
        train_images=f"{len(data['train']):,}",
        eval_split="test",
        eval_images=f"{len(data['test']):,}",
        size=model.config.image_size,
        crop_pct=processor.crop_pct,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        averaged=False,
        metrics=metrics,
        skipped=0,
        settings=settings_of(training, trainer.state.epoch),
        environment=", ".join(f"{name} {found[name]}" for name in ("device", "torch", "transformers", "date")),
        licence=licence,
        is_carried=is_carried,
    )


def settings_of(training: TrainingArguments, epochs: float) -> dict:
    return {
        "optimizer": training.optim.value,
        "learning rate": f"{training.learning_rate:g}, cosine",
        "weight decay": f"{training.weight_decay:g}",
        "epochs": round(epochs, 2),
        "batch": training.per_device_train_batch_size,
        "label smoothing": training.label_smoothing_factor,
        "seed": training.seed,
    }


def write_asset(trainer: Trainer, data, metrics: dict[str, float], folder: Path) -> None:
    """The trained model as the package carries it: without pictures, and without code, which is the package's own."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = Path(trainer.args.output_dir)
    shutil.copyfile(trained / "model.safetensors", folder / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((trained / name).read_text(encoding="utf-8"))
        del fields["auto_map"]
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    licence = f"{LICENCE_OF_DATA} Like the package, they are under the Apache License, Version 2.0."
    card = build_card(trainer, data, metrics, folder.name, licence, is_carried=True)
    card.data.license = "apache-2.0"
    card.save(folder / "README.md")
    names = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    write_sums(folder, [folder / name for name in names])


def draw_predictions(folder: Path, split: Dataset, path: Path, count: int = 10) -> list[dict]:
    """Classify the first images of a split with `pipeline` and draw each with its three likeliest labels."""
    samples = split.select(range(count))
    names = split.features["label"].names
    predictions = pipeline("image-classification", model=str(folder))(list(samples["image"]), top_k=3)
    figure, axes = plt.subplots(2, count // 2, figsize=(2.3 * count / 2, 6.4), layout="constrained")
    for axis, image, label, top in zip(axes.flat, samples["image"], samples["label"], predictions):
        axis.imshow(image, cmap="gray")
        axis.set_axis_off()
        axis.set_title(
            names[label], fontweight="bold", color="tab:green" if top[0]["label"] == names[label] else "tab:red"
        )
        lines = "\n".join(f"{entry['score']:4.0%} {entry['label']}" for entry in top)
        axis.text(0, -0.06, lines, transform=axis.transAxes, va="top", family="monospace", fontsize=9)
    figure.suptitle("vitae-nano on Fashion-MNIST: true label above (green: predicted), three likeliest below")
    figure.savefig(path, dpi=120)
    return predictions


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/vitae-nano-fashion"), help="folder to write")
    parser.add_argument("--epochs", type=float, default=14)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--asset", type=Path, help="also write the model as the package carries it, into this folder")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)  # at the beginning: no training for a folder that cannot be
    started = time.perf_counter()
    set_seed(arguments.seed)
    data = load_dataset("parquet", data_files={split: str(DATA / f"{split}-*.parquet") for split in ("train", "test")})
    trainer = train(data, arguments.output, arguments)
    metrics = evaluate(arguments.output, data["test"])
    draw_curves(trainer.state.log_history, arguments.output / "training_curves.png")
    licence = f"{LICENCE_OF_DATA} State the licence of the weights before publishing."
    build_card(trainer, data, metrics, arguments.output.name, licence, is_carried=False).save(
        arguments.output / "README.md"
    )
    if arguments.asset is not None:
        write_asset(trainer, data, metrics, arguments.asset)
    picture = arguments.output / "predictions.png"
    draw_predictions(arguments.output, data["test"], picture)
    return {
        "model": str(arguments.output),
        "picture": str(picture),
        "top1_percent": round(metrics["top1"], 2),
        "epochs": arguments.epochs,
        "seconds": round(time.perf_counter() - started),
        "seed": arguments.seed,
        **environment(),
    }


if __name__ == "__main__":
    run_command(main)
