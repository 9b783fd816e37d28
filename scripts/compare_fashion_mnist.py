# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does ViTAE need less data than a plain ViT and Swin of its size? The paper's claim, tested on Fashion-MNIST.

    make data-fashion-mnist
    python scripts/compare_fashion_mnist.py --data data/fashion_mnist --output results/fashion_mnist_comparison

Trains `vitae-nano` and transformers' ViT and Swin, of equal parameter counts, from scratch on 1, 10 and 100 % of the
training images, three seeds each, under one recipe (`RECIPE`, run by `vitae train`). The seed also draws the part
of the data. Each network first gets the best learning rate of a grid, by its accuracy on held-out training images; the
test images only give the final figures. Hours on a CPU; a stopped run goes on where it was. Writes OUTPUT.json,
OUTPUT.png and OUTPUT.md. `--share_epochs` and `--learning_rates` make it shorter.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from kept_results import go_on, share_and_epochs
from matplotlib.figure import Figure
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification, set_seed

from vitae_hf import ViTAEForImageClassification, config_from_preset
from vitae_hf.commands import train
from vitae_hf.data.sources import draw_by_class, load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json, write_text


def vit():
    config = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=10, **config))


def swin(**changes):
    config = {"embed_dim": 20, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4, "mlp_ratio": 3.75}
    return SwinForImageClassification(SwinConfig(image_size=64, patch_size=4, num_labels=10, **config, **changes))


NETWORKS = {
    "vitae-nano": lambda: ViTAEForImageClassification(config_from_preset("vitae-nano")),
    "vit": vit,
    "swin": swin,
}
RECIPE = {
    "image_size": 64,
    "crop_pct": 1.0,
    "min_crop_scale": 0.7,
    "auto_augment": "",
    "color_jitter": 0.0,
    "erasing_prob": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "label_smoothing": 0.1,
    "interpolation": "bilinear",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 200,
}


class Comparison:
    """The runs so far, kept in a JSON file after each."""

    def __init__(self, arguments: argparse.Namespace):
        self.path = arguments.output.with_suffix(".json")
        self.networks = {name: network().num_parameters() for name, network in NETWORKS.items()}
        new = {"parameters": self.networks, "recipe": RECIPE, "learning_rate_runs": [], "runs": []}
        self.results = go_on(self.path, new, "parameters", "recipe")

    def run(self, kind: str, dataset: Path, **settings) -> dict:
        """One training run by `vitae train`, unless it has been done before."""
        for record in self.results[kind]:
            if all(record[name] == value for name, value in settings.items()):
                return record
        with tempfile.TemporaryDirectory() as folder:
            set_seed(settings["seed"])
            NETWORKS[settings["network"]]().save_pretrained(f"{folder}/start")
            values = {
                **RECIPE,
                **{name: value for name, value in settings.items() if name not in ("network", "epochs", "share")},
                "model_name_or_path": f"{folder}/start",
                "dataset": dataset,
                "train_share": settings["share"],
                "num_train_epochs": settings["epochs"],
                "output_dir": f"{folder}/trained",
            }
            done = train.main([word for name, value in values.items() for word in (f"--{name}", str(value))])
        record = {**settings, **{name: done[name] for name in ("top1_percent", "eval_loss", "images_per_s")}}
        self.results[kind].append(record)
        self.results.update(environment())
        write_json(self.results, self.path)
        print(json.dumps(record), flush=True)
        return record


def choose_learning_rates(comparison: Comparison, data: Path, rates: list[float]) -> dict[str, float]:
    """The best of the grid for each network, trained briefly on 10 % of the training images, tested on other 10 %."""
    with tempfile.TemporaryDirectory() as folder:
        tested, rest = draw_by_class(load_labelled_images(str(data))["train"], 0.1, 0, "the share that tests")
        trained, _ = draw_by_class(rest, 1 / 9, 0, "the share that trains")
        for split, part in {"train": trained, "test": tested}.items():
            part.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")
        best = {}
        for network in NETWORKS:
            runs = [
                comparison.run(
                    "learning_rate_runs",
                    Path(folder),
                    network=network,
                    share=1.0,
                    epochs=5.0,
                    learning_rate=rate,
                    seed=0,
                )
                for rate in rates
            ]
            best[network] = max(runs, key=lambda run: run["top1_percent"])["learning_rate"]
    return best


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and range over the seeds, for each network and share."""
    rows = []
    for network in NETWORKS:
        for share in sorted({run["share"] for run in runs}):
            top1 = [run["top1_percent"] for run in runs if (run["network"], run["share"]) == (network, share)]
            if top1:
                row = {"network": network, "share": share, "seeds": len(top1), "mean": statistics.mean(top1)}
                rows.append({**row, "lowest": min(top1), "highest": max(top1)})
    return rows


def draw(rows: list[dict], parameters: dict[str, int], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for network in parameters:
        mine = [row for row in rows if row["network"] == network]
        shares, means = [100 * row["share"] for row in mine], [row["mean"] for row in mine]
        spread = [[row["mean"] - row["lowest"] for row in mine], [row["highest"] - row["mean"] for row in mine]]
        label = f"{network} ({parameters[network]:,} parameters)"
        axis.errorbar(shares, means, spread, label=label, marker="o", capsize=3)
    axis.set(xscale="log", xlabel="training images used (%)", ylabel="top-1 on the test images (%)")
    axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    axis.set_title("Fashion-MNIST from scratch: mean and range over the seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def table(rows: list[dict], rates: dict[str, float]) -> str:
    shares = sorted({row["share"] for row in rows})
    lines = ["| network | learning rate | " + " | ".join(f"{share:.0%} of the images" for share in shares) + " |"]
    lines.append("|---|---:|" + "---:|" * len(shares))
    for network in rates:
        cells = {
            row["share"]: f"{row['mean']:.2f} ({row['lowest']:.2f}–{row['highest']:.2f})"
            for row in rows
            if row["network"] == network
        }
        lines.append(
            f"| {network} | {rates[network]:g} | " + " | ".join(cells.get(share, "–") for share in shares) + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of `make data-fashion-mnist`, or the like")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--share_epochs",
        type=share_and_epochs,
        nargs="+",
        default=[(0.01, 50.0), (0.1, 8.0), (1.0, 1.0)],
        metavar="SHARE:EPOCHS",
        help="how much of the training images, how many times",
    )
    arguments = parser.parse_args(argv)
    comparison = Comparison(arguments)
    rates = choose_learning_rates(comparison, arguments.data, arguments.learning_rates)
    done = []
    for seed in arguments.seeds:
        for share, epochs in arguments.share_epochs:
            for network in NETWORKS:
                settings = {"network": network, "share": share, "epochs": epochs, "learning_rate": rates[network]}
                done.append(comparison.run("runs", arguments.data, seed=seed, **settings))
                rows = summarise(done)
                draw(rows, comparison.networks, arguments.output.with_suffix(".png"))
                write_text(table(rows, rates), arguments.output.with_suffix(".md"))
    return {"summary": rows, "learning_rates": rates, **environment()}


if __name__ == "__main__":
    run_command(main)
