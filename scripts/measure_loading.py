# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How many images a second do the workers prepare? Training on a GPU cannot be faster than that.

    python scripts/measure_loading.py --dataset FOLDER --workers 1 8 16 --output results/loading.json

Reads, decodes and augments images as `vitae train` does (the recipe's transform, uint8 batches) and discards the
batches. The first batches, during which the workers start, do not count.
"""

import argparse

from vitae_hf.data.augmentation import AugmentationArguments, training_transform
from vitae_hf.data.samples import ImageDataset
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.deployment.benchmarking import loading_images_per_s
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="as for vitae train")
    parser.add_argument("--split", default="train")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="for each number of workers")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    split = load_labelled_images(arguments.dataset, splits=[arguments.split])[arguments.split]
    dataset = ImageDataset(split, training_transform(arguments.image_size, AugmentationArguments()), seed=0)
    measured = {
        workers: round(loading_images_per_s(dataset, workers, arguments.batch_size, arguments.seconds), 1)
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
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
