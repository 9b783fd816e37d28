# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does pretraining on images without labels help where labels are few? Tested with `vitae-nano-mae`.

    python scripts/compare_mae.py --output results/mae_nano.json

Pretrains a masked autoencoder on the 6,000 training images of `examples/fashion_mnist_mini` without their labels
(`vitae pretrain`), fine-tunes it on 1 % of them with labels, and trains the same network from scratch on the
same 60 images for as many updates (`vitae train`), for three seeds, which also draw the 60 images. First each way of
training gets the best learning rate of a grid, chosen with another draw of 60 training images and by the accuracy on
1,000 further ones. The test images only give the final figures. A stopped comparison goes on after its last finished
run.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from vitae_hf.commands import pretrain, train
from vitae_hf.data.sources import draw_by_class, load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.failures import run_command


DATA = Path(__file__).parents[1] / "examples" / "fashion_mnist_mini"
COMMON = {
    "crop_pct": 1.0,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "dataloader_drop_last": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 100,
    "per_device_eval_batch_size": 250,
}
PRETRAINING = {
    **COMMON,
    "preset": "vitae-nano-mae",
    "min_crop_scale": 0.5,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "min_learning_rate": 0.0,
    "adam_beta2": 0.95,
}
TRAINING = {
    **COMMON,
    "min_crop_scale": 0.7,
    "interpolation": "bilinear",
    "auto_augment": "",
    "color_jitter": 0.0,
    "erasing_prob": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "per_device_train_batch_size": 20,
}
WAYS = {"scratch": {"layer_decay": 1.0}, "pretrained": {"layer_decay": 0.75}}
DRAWN_FOR_RATES = 1000  # seed that draws the images for choosing learning rates; the comparison uses others


def words(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


class Comparison:
    """The runs so far, kept in a JSON file after each; the pretrained models in folders."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.path = arguments, arguments.output
        self.path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the first run
        self.results = {
            "pretraining": {"recipe": PRETRAINING, "epochs": arguments.pretraining_epochs, "eval_loss": {}},
            "training": {"recipe": TRAINING, "ways": WAYS, "epochs": arguments.epochs, "share": arguments.share},
            "learning_rate_runs": [],
            "runs": [],
        }
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            for name, ours in json.loads(json.dumps(self.results)).items():
                theirs = earlier[name]
                if isinstance(ours, dict) and {**ours, "eval_loss": 0} != {**theirs, "eval_loss": 0}:
                    raise ValueError(f"{self.path} is of another {name}, {theirs}: choose another --output and --work")
            self.results = earlier

    def save(self) -> None:
        self.results.update(environment())
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.path)

    def pretrain(self, seed: int) -> Path:
        folder = self.arguments.work / f"pretrained-{seed}"
        done = folder / "eval_results.json"  # written after the model
        if not done.exists():
            settings = {
                "dataset": self.arguments.data,
                "num_train_epochs": self.arguments.pretraining_epochs,
                "seed": seed,
            }
            pretrain.main(words({**PRETRAINING, **settings, "output_dir": folder}))
        self.results["pretraining"]["eval_loss"][str(seed)] = round(json.loads(done.read_text())["eval_loss"], 4)
        return folder

    def train(self, kind: str, dataset: Path, share: float, **settings) -> dict:
        """One run from scratch or from the pretrained model, unless it has been done before."""
        for record in self.results[kind]:
            if all(record[name] == value for name, value in settings.items()):
                return record
        way, seed = settings["way"], settings["seed"]
        start = {"preset": PRETRAINING["preset"]}
        if way == "pretrained":
            start = {"model_name_or_path": self.pretrain(seed)}
        with tempfile.TemporaryDirectory() as folder:
            values = {**TRAINING, **WAYS[way], **start, "dataset": dataset, "train_share": share, "seed": seed}
            values |= {"num_train_epochs": self.arguments.epochs, "learning_rate": settings["learning_rate"]}
            done = train.main(words({**values, "output_dir": f"{folder}/trained"}))
        record = {**settings, "top1_percent": done["top1_percent"], "eval_loss": done["eval_loss"]}
        self.results[kind].append(record)
        self.save()
        print(json.dumps(record), flush=True)
        return record


def choose_learning_rates(comparison: Comparison, data: Path, share: float, rates: list[float]) -> dict[str, float]:
    """The best of the grid for each way of training, by the accuracy on held-out training images."""
    with tempfile.TemporaryDirectory() as folder:
        images = load_labelled_images(str(data))["train"]
        tested, rest = draw_by_class(images, 1000 / len(images), DRAWN_FOR_RATES, "the share that tests learning rates")
        trained, _ = draw_by_class(rest, share * len(images) / len(rest), DRAWN_FOR_RATES, "--share")
        for split, part in {"train": trained, "test": tested}.items():
            part.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")
        best = {}
        for way in WAYS:
            runs = [
                comparison.train(
                    "learning_rate_runs", Path(folder), 1.0, way=way, learning_rate=rate, seed=DRAWN_FOR_RATES
                )
                for rate in rates
            ]
            best[way] = max(runs, key=lambda run: run["top1_percent"])["learning_rate"]
    return best


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/compare_mae"), help="folder of the pretrained models"
    )
    parser.add_argument("--share", type=float, default=0.01, help="of the training images that have labels")
    parser.add_argument("--pretraining_epochs", type=float, default=20)
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    comparison = Comparison(arguments)
    rates = choose_learning_rates(comparison, arguments.data, arguments.share, arguments.learning_rates)
    for seed in arguments.seeds:
        for way in WAYS:
            comparison.train("runs", arguments.data, arguments.share, way=way, learning_rate=rates[way], seed=seed)
    summary = {}
    for way in WAYS:
        top1 = [run["top1_percent"] for run in comparison.results["runs"] if run["way"] == way]
        summary[way] = {"mean": statistics.mean(top1), "lowest": min(top1), "highest": max(top1)}
    comparison.results["learning_rates"], comparison.results["top1_percent"] = rates, summary
    comparison.save()
    return {"top1_percent": summary, "learning_rates": rates, **environment()}


if __name__ == "__main__":
    run_command(main)
