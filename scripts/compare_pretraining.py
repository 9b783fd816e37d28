# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does pretraining on images without labels help where labels are few? Tested with a tiny network of either kind.

    python scripts/compare_pretraining.py --preset vitae-nano --processes 2 --output results/mim_nano.json

Pretrains on the 6,000 training images of `examples/fashion_mnist_mini` without their labels (`vitae pretrain`: a masked
autoencoder of `vitae-nano-mae`, a masked image model of `vitae-nano`), fine-tunes on a share of them with labels, and
trains the same network from scratch on the same images for as many updates (`vitae train`), for three seeds, which also
draw the images. First each way of training gets the best learning rate of a grid, for each share, chosen with another
draw of training images and by the accuracy on 1,000 further ones. The test images only give the final figures. A
comparison that was stopped goes on after its last finished runs.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from kept_results import read_results, share_and_epochs

from vitae_hf.commands import pretrain, train
from vitae_hf.data.sources import draw_by_class, load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json, write_text


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
    "min_crop_scale": 0.5,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "min_learning_rate": 0.0,
}
KINDS = {
    "vitae-nano-mae": {**PRETRAINING, "preset": "vitae-nano-mae", "adam_beta2": 0.95},
    "vitae-nano": {**PRETRAINING, "preset": "vitae-nano", "mask_patch_size": 16, "learning_rate": 4e-3},
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


def pretrain_once(settings: dict) -> float:
    """The loss of a pretrained model, which is made unless its folder is there."""
    done = Path(settings["output_dir"], "eval_results.json")  # written after the model
    asked, kept = json.dumps(settings, default=str), Path(settings["output_dir"], "settings.json")
    if done.exists() and (not kept.exists() or kept.read_text(encoding="utf-8") != asked):
        raise ValueError(f"{done.parent} was pretrained with other settings: choose another --work")
    if not done.exists():
        shutil.rmtree(settings["output_dir"], ignore_errors=True)  # of a run that was stopped before its end
        pretrain.main(words(settings))
        write_text(asked, kept)
    return round(json.loads(done.read_text(encoding="utf-8"))["eval_loss"], 4)


def train_once(settings: dict) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = train.main(words({**settings, "output_dir": f"{folder}/trained"}))
    return {name: done[name] for name in ("top1_percent", "eval_loss")}


def as_they_end(do: Callable[[dict], Any], jobs: dict[Any, dict], processes: int) -> Iterable[tuple[Any, Any]]:
    """The name and the result of each job, which is a name and what to call `do` with; several processes share them."""
    if processes == 1:
        yield from ((name, do(settings)) for name, settings in jobs.items())
        return
    # One thread each: otherwise every process would take all cores.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        names = {pool.submit(do, settings): name for name, settings in jobs.items()}
        for future in as_completed(names):
            yield names[future], future.result()


class Comparison:
    """The runs so far, kept in a JSON file after each; the pretrained models in folders."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.path = arguments, arguments.output
        self.path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the first run
        recipe, epochs = KINDS[arguments.preset], arguments.pretraining_epochs
        self.results = {
            "pretraining": {"recipe": recipe, "epochs": epochs, "eval_loss": {}},
            "training": {"recipe": TRAINING, "ways": WAYS, "share_epochs": arguments.share_epochs},
            "learning_rate_runs": [],
            "runs": [],
        }
        if self.path.exists():
            earlier = read_results(self.path, *self.results)
            for name, ours in json.loads(json.dumps(self.results)).items():
                theirs = earlier[name]
                if isinstance(ours, dict) and {**ours, "eval_loss": 0} != {**theirs, "eval_loss": 0}:
                    raise ValueError(f"{self.path} is of another {name}, {theirs}: choose another --output and --work")
            self.results = earlier

    def save(self) -> None:
        self.results.update({**environment(), "processes": self.arguments.processes})
        write_json(self.results, self.path)

    def pretrained(self, seed: int) -> Path:
        return self.arguments.work / f"pretrained-{seed}"

    def pretrain(self, seeds: list[int]) -> None:
        recipe = {**self.results["pretraining"]["recipe"], "num_train_epochs": self.arguments.pretraining_epochs}
        recipe["dataset"] = self.arguments.data
        jobs = {seed: {**recipe, "seed": seed, "output_dir": self.pretrained(seed)} for seed in seeds}
        for seed, loss in as_they_end(pretrain_once, jobs, self.arguments.processes):
            self.results["pretraining"]["eval_loss"][str(seed)] = loss
            self.save()

    def train(self, kind: str, runs: list[dict], data: dict[float, tuple[Path, float]]) -> list[dict]:
        """The records of these runs; those that have not been done before are done.

        Args:
            kind: the list of results that they belong to.
            runs: way, share, learning rate and seed of each.
            data: for each share the folder of the data, and what share of those images to train on.
        """
        records = self.results[kind]
        jobs = {
            tuple(run.items()): self.settings(*data[run["share"]], **run)
            for run in runs
            if not any(run.items() <= record.items() for record in records)
        }
        for run, figures in as_they_end(train_once, jobs, self.arguments.processes):
            records.append({**dict(run), **figures})
            self.save()
            print(json.dumps(records[-1]), flush=True)
        return [record for run in runs for record in records if run.items() <= record.items()]

    def settings(self, folder: Path, part: float, *, way: str, share: float, learning_rate: float, seed: int) -> dict:
        """Arguments of `vitae train` for one run."""
        start: dict[str, Any] = {"preset": self.arguments.preset}
        if way == "pretrained":
            start = {"model_name_or_path": self.pretrained(seed)}
        values = {**TRAINING, **WAYS[way], **start, "dataset": folder, "train_share": part, "seed": seed}
        return {**values, "num_train_epochs": self.arguments.share_epochs[share], "learning_rate": learning_rate}


def write_held_out(data: Path, share: float, folder: Path) -> Path:
    """Data that choose learning rates: a share of the training images, and 1,000 other ones as the test images."""
    images = load_labelled_images(str(data))["train"]
    tested, rest = draw_by_class(images, 1000 / len(images), DRAWN_FOR_RATES, "the share that tests learning rates")
    trained, _ = draw_by_class(rest, share * len(images) / len(rest), DRAWN_FOR_RATES, "--share_epochs")
    folder.mkdir()
    for split, part in {"train": trained, "test": tested}.items():
        part.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")
    return folder


def choose_learning_rates(comparison: Comparison) -> dict[tuple[float, str], float]:
    """The best of the grid for each share and way of training, by the accuracy on held-out training images."""
    arguments = comparison.arguments
    runs = [
        {"way": way, "share": share, "learning_rate": rate, "seed": DRAWN_FOR_RATES}
        for share in arguments.share_epochs
        for way in WAYS
        for rate in arguments.learning_rates
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = {
            share: (write_held_out(arguments.data, share, Path(folder, str(share))), 1.0)
            for share in arguments.share_epochs
        }
        records = comparison.train("learning_rate_runs", runs, data)
    best: dict[tuple[float, str], dict] = {}
    for record in records:
        key = record["share"], record["way"]
        if key not in best or record["top1_percent"] > best[key]["top1_percent"]:
            best[key] = record
    return {key: record["learning_rate"] for key, record in best.items()}


def summarise(records: list[dict], rates: dict[tuple[float, str], float]) -> list[dict]:
    """Mean and range over the seeds, for each share and way of training."""
    rows = []
    for (share, way), rate in rates.items():
        top1 = [record["top1_percent"] for record in records if (record["share"], record["way"]) == (share, way)]
        row = {"share": share, "way": way, "learning_rate": rate, "seeds": len(top1)}
        rows.append({**row, "mean": statistics.mean(top1), "lowest": min(top1), "highest": max(top1)})
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=KINDS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, help="folder of the pretrained models; default: outputs/compare_PRESET")
    parser.add_argument(
        "--share_epochs",
        type=share_and_epochs,
        nargs="+",
        default=[(0.01, 100.0), (0.1, 30.0)],
        metavar="SHARE:EPOCHS",
        help="how much of the training images has labels, and how many times to train on them",
    )
    parser.add_argument("--pretraining_epochs", type=float, default=20)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--processes", type=int, default=1, help="how many runs go on at once; several have one thread each"
    )
    arguments = parser.parse_args(argv)
    arguments.share_epochs = dict(arguments.share_epochs)
    arguments.work = arguments.work or Path("outputs", f"compare_{arguments.preset}")
    comparison = Comparison(arguments)
    comparison.pretrain([DRAWN_FOR_RATES, *arguments.seeds])
    rates = choose_learning_rates(comparison)
    runs = [
        {"way": way, "share": share, "learning_rate": rate, "seed": seed}
        for seed in arguments.seeds
        for (share, way), rate in rates.items()
    ]
    records = comparison.train("runs", runs, {share: (arguments.data, share) for share in arguments.share_epochs})
    comparison.results["summary"] = summarise(records, rates)
    comparison.save()
    return {"summary": comparison.results["summary"], **environment()}


if __name__ == "__main__":
    run_command(main)
