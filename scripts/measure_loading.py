# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How many images a second can a number of workers load? To compare with how many a GPU can train on.

    python scripts/measure_loading.py --dataset FOLDER --workers 1 8 16 --output results/loading.json

Reads, decodes and augments images as `vitae train` does (the transform of the recipe, batches in uint8) and discards
them. The first batches, during which the workers start, do not count.
"""

import argparse
import json
import time
from pathlib import Path

from torch.utils.data import DataLoader, RandomSampler

from vitae_hf.data.augmentation import AugmentationArguments, training_transform
from vitae_hf.data.samples import ImageDataset, collate
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.failures import run_command


def images_per_s(dataset: ImageDataset, workers: int, batch_size: int, seconds: float) -> float:
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    batches = iter(DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, num_workers=workers))
    for _ in range(2 * max(workers, 1)):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(batches)["labels"])
    return count / (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="as for vitae train")
    parser.add_argument("--split", default="train")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="for each number of workers")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    split = load_labelled_images(arguments.dataset, splits=[arguments.split])[arguments.split]
    dataset = ImageDataset(split, training_transform(arguments.image_size, AugmentationArguments()), seed=0)
    measured = {
        workers: round(images_per_s(dataset, workers, arguments.batch_size, arguments.seconds), 1)
        for workers in arguments.workers
    }
    record = {
        "images_per_s_by_workers": measured,
        "dataset": arguments.dataset,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        **environment(),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    run_command(main)
