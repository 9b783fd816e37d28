# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does a detector find more on a ViTAE backbone than on Swin of equal size? RT-DETR on the rendered garment scenes.

    python scripts/compare_detection.py --output results/detection_comparison

Trains RT-DETR on `vitae-nano` and on transformers' Swin, of equal parameter counts with the same head, from random
weights under one recipe (that of `make detection-demo`, by `vitae detect`), with several seeds each: the seed draws the
weights, the order of the pictures and their augmentation. An hour or two on two cores; a stopped comparison goes on
where it was. Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from kept_results import go_on
from transformers import SwinConfig, set_seed

from vitae_hf import config_from_preset
from vitae_hf.commands import detect
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.detection.data import load_boxed_images
from vitae_hf.dense.detection.models import HeadSize, new_detector
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json, write_text


SCENES = Path(__file__).parents[1] / "examples" / "garment_scenes"
HEAD = HeadSize(channels=64, layers=3, queries=50)
FIGURES = ("map_percent", "map_50_percent", "map_75_percent", "images_per_s")


def swin() -> SwinConfig:
    """Three stages of strides 4, 8 and 16, as those of `vitae-nano`."""
    settings = {"embed_dim": 20, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4, "mlp_ratio": 3.75}
    names = [f"stage{stage}" for stage in (1, 2, 3)]
    return SwinConfig(image_size=[96, 128], patch_size=4, drop_path_rate=0.0, out_features=names, **settings)


BACKBONES = {"vitae-nano": lambda: dense_config(config_from_preset("vitae-nano")), "swin": swin}


def build(backbone: str, names: dict[int, str], seed: int):
    """RT-DETR on a backbone, with the random weights of a seed."""
    set_seed(seed)
    return new_detector("rt_detr", BACKBONES[backbone](), names, HEAD)


class Comparison:
    """The runs so far, kept in a JSON file after each."""

    def __init__(self, path: Path, names: dict[int, str]):
        self.path, self.names = path.with_suffix(".json"), names
        backbones = {name: build(name, names, 0) for name in BACKBONES}
        parameters = {
            name: {"all": model.num_parameters(), "backbone": model.model.backbone.model.num_parameters()}
            for name, model in backbones.items()
        }
        new = {"parameters": parameters, "recipe": "rt-detr-garment-scenes", "runs": []}
        self.results = go_on(self.path, new, "parameters", "recipe")

    def run(self, backbone: str, seed: int, max_steps: int | None) -> dict:
        """One training run by `vitae detect`, unless it has been done. Its recipe says how long, or `max_steps`."""
        asked = {"backbone": backbone, "seed": seed, "max_steps": max_steps}
        for record in self.results["runs"]:
            if all(record.get(name) == value for name, value in asked.items()):
                return record
        with tempfile.TemporaryDirectory() as folder:
            build(backbone, self.names, seed).save_pretrained(f"{folder}/start")
            values = {
                "config": "rt-detr-garment-scenes",
                "dataset": SCENES,
                "model_name_or_path": f"{folder}/start",
                "output_dir": f"{folder}/trained",
                "seed": seed,
                "eval_strategy": "no",
                "disable_tqdm": True,
                **({} if max_steps is None else {"max_steps": max_steps}),
            }
            done = detect.main([word for name, value in values.items() for word in (f"--{name}", str(value))])
        record = {**asked, **{name: done[name] for name in (*FIGURES, "updates", "seconds")}}
        self.results["runs"].append(record)
        self.results.update(environment())
        write_json(self.results, self.path)
        print(json.dumps(record), flush=True)
        return record


def table(all_runs: list[dict], parameters: dict) -> str:
    """Mean and range over the seeds, for each backbone."""
    lines = [
        "| backbone | its parameters | seeds | AP, % | AP50, % | AP75, % | pictures/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for backbone in BACKBONES:
        runs = [run for run in all_runs if run["backbone"] == backbone]
        columns = [[run[name] for run in runs] for name in FIGURES]
        cells = [f"{statistics.mean(c):.1f} ({min(c):.1f}–{max(c):.1f})" for c in columns if c]
        count = parameters[backbone]["backbone"]
        lines.append(f"| {backbone} | {count:,} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, help="updates of a run; default: those of the recipe")
    arguments = parser.parse_args(argv)
    comparison = Comparison(arguments.output, load_boxed_images(str(SCENES))[1])
    runs = [  # all backbones with a seed before the next, so that a stopped comparison is fair
        comparison.run(backbone, seed, arguments.max_steps) for seed in arguments.seeds for backbone in BACKBONES
    ]
    text = table(runs, comparison.results["parameters"])
    write_text(text, arguments.output.with_suffix(".md"))
    print(text, flush=True)
    means = {
        backbone: statistics.mean(run["map_percent"] for run in runs if run["backbone"] == backbone)
        for backbone in BACKBONES
    }
    return {"mean_map_percent": means, "seeds": arguments.seeds, **environment()}


if __name__ == "__main__":
    run_command(main)
