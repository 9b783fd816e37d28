# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How close does `vitae predict` come to the slower of reading and computing, and how far from `pipeline` is it?

    python scripts/measure_predict.py --photographs FOLDER --output results/predict_cpu.json

Writes JPEGs of 500×375 pixels, which are varied crops of the photographs in FOLDER, and takes turns, for each network,
with reading alone, the model alone, both (with writing the rows), and the library's pipeline, whose batch size and
number of workers are those that were fastest on a part of the pictures. Once reading and the model have a core each,
once they share all cores, as the command does by default; then the cores do both jobs, and `shared_bound` is what
cores that were always busy would reach. Also says how much decoding at a lower scale (`--draft`) changes pixels.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import logging

from vitae_hf import ViTAEImageProcessor, ViTAEImageProcessorPil, config_from_preset, prepare_for_inference
from vitae_hf.commands.predict import default_dtype
from vitae_hf.deployment.benchmarking import spread
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json
from vitae_hf.loading import load_trained
from vitae_hf.prediction.dealing import Dealing
from vitae_hf.prediction.listing import Listing
from vitae_hf.prediction.parts import Parts
from vitae_hf.prediction.reading import Batch, Chunk, Item, PictureReader, chunks, read
from vitae_hf.prediction.rows import Predictor, usable_cores
from vitae_hf.prediction.run import Run


SIZES = {"vitae-nano": 64, "vitae-t": 224, "vitaev2-s": 224}
PHOTOGRAPH = (500, 375)
BATCH = 32


def write_photographs(folder: Path, source: Path, count: int) -> Path:
    """JPEGs of one size: crops at random places of the photographs in turn, of at least half their sides."""
    folder.mkdir()
    photographs = [PIL.Image.open(path).convert("RGB") for path in sorted(source.iterdir())]
    draw = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        share = draw.uniform(0.5, 1) * min(photograph.width / PHOTOGRAPH[0], photograph.height / PHOTOGRAPH[1])
        width, height = (share * side for side in PHOTOGRAPH)
        left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
        crop = photograph.resize(PHOTOGRAPH, PIL.Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        crop.save(folder / f"{number:05}.jpg", quality=90)
    return folder


def load(network: str) -> tuple[Any, Any]:
    """A network and its image processor; of the published variants one with random weights."""
    if network == "vitae-nano":
        return load_trained("vitae-nano-fashion")
    torch.manual_seed(0)
    config = config_from_preset(network, image_size=SIZES[network])
    return AutoModelForImageClassification.from_config(config).eval(), ViTAEImageProcessor(size=SIZES[network])


def read_alone(processor: Any, folder: Path, workers: int) -> int:
    items = (Item(path.name, str(path)) for path in sorted(folder.iterdir()))
    return sum(len(batch.names) for batch in read(processor, chunks([("", items)], BATCH), workers))


def model_alone(predictor: Predictor, size: int, count: int, runners: int) -> int:
    pixel_values = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
    batch = Batch("", False, [""] * BATCH, [None] * BATCH, pixel_values, 0.0, 0.0)
    batches = iter([batch] * max(2, round(count / BATCH)))
    return sum(len(rows) for _, rows in predictor.run(batches, runners))


def both(predictor: Predictor, folder: Path, workers: int, runners: int) -> int:
    with tempfile.TemporaryDirectory() as output:
        parts = Parts(Path(output))
        parts.begin({})
        run = Run(predictor, Dealing(Listing([str(folder)]), parts), parts)
        return run(BATCH, workers, runners)["pictures"]


def by_pipeline(classify: Any, files: list[str], batch_size: int, workers: int) -> int:
    torch.set_num_threads(usable_cores())
    return sum(1 for _ in classify(files, batch_size=batch_size, num_workers=workers))


def images_per_s(function: Callable[[], int]) -> float:
    started = time.perf_counter()
    return function() / (time.perf_counter() - started)


def best_of_pipeline(classify: Any, files: list[str]) -> dict[str, int]:
    """The fastest combination of batch size and number of workers."""
    ways = [
        {"batch_size": size, "workers": workers}
        for size, workers in itertools.product((1, 8, 32), range(usable_cores() + 1))
    ]
    return max(ways, key=lambda way: images_per_s(partial(by_pipeline, classify, files, **way)))


def measure(network: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Pictures a second of one network in every way, and their ratios in each round."""
    files = sorted(map(str, folder.iterdir()))
    model, processor = load(network)
    classify = pipeline("image-classification", model=load(network)[0], image_processor=processor, device="cpu")
    predictor = Predictor(prepare_for_inference(model, getattr(torch, default_dtype("cpu"))), processor)
    best = best_of_pipeline(classify, files[: max(64, len(files) // 20)])
    ways = {"a_core_each": (1, 1), "all_cores_shared": (usable_cores(),) * 2}
    functions: dict[str, Callable[[], int]] = {"pipeline": partial(by_pipeline, classify, files, **best)}
    for way, (workers, runners) in ways.items():
        functions[f"{way} reading"] = partial(read_alone, processor, folder, workers)
        functions[f"{way} model"] = partial(model_alone, predictor, SIZES[network], len(files), runners)
        functions[f"{way} both"] = partial(both, predictor, folder, workers, runners)
    model_alone(predictor, SIZES[network], BATCH, 0)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(images_per_s(function))
    return {
        "image_size": SIZES[network],
        "dtype": default_dtype("cpu"),
        "pipeline": {**best, **rounded_spread(found["pipeline"])},
        **{way: figures_of(way, found) for way in ways},
    }


def figures_of(way: str, found: dict[str, list[float]]) -> dict[str, Any]:
    reading, model, end_to_end = (found[f"{way} {name}"] for name in ("reading", "model", "both"))
    rounds = list(zip(reading, model, end_to_end, found["pipeline"]))
    figures = {
        "reading": rounded_spread(reading),
        "model": rounded_spread(model),
        "end_to_end": rounded_spread(end_to_end),
        "over_smaller": rounded_spread([whole / min(one, other) for one, other, whole, _ in rounds]),
        "over_pipeline": rounded_spread([whole / pipeline for _, _, whole, pipeline in rounds]),
    }
    if way == "all_cores_shared":
        figures["shared_bound"] = rounded_spread([1 / (1 / one + 1 / other) for one, other, _, _ in rounds])
    return figures


def rounded_spread(values: list[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in spread(values).items()}


def measure_draft(folder: Path, size: int, count: int) -> dict[str, Any]:
    """By how many of 256 levels pixels differ: between decoding at a lower scale and in full, beside torchvision and
    Pillow; and the milliseconds that a picture takes with and without."""
    torch.set_num_threads(1)  # as workers have
    contents = [path.read_bytes() for path in sorted(folder.iterdir())[:count]]
    processor = ViTAEImageProcessor(size=size)
    readers = {"draft": PictureReader(processor, True), "full": PictureReader(processor)}
    readers["pillow"] = PictureReader(ViTAEImageProcessorPil(size=size))
    pixels, ms = {}, {}
    for name, reader in readers.items():
        started = time.perf_counter()
        chunk = Chunk("", [Item("", content) for content in contents], True)
        pixels[name] = reader[chunk].pixel_values.int()
        ms[name] = round(1000 * (time.perf_counter() - started) / len(contents), 3)
    figures: dict[str, Any] = {"ms_per_picture": ms}
    for name in ("draft", "pillow"):
        difference = (pixels[name] - pixels["full"]).abs()
        shares = {"share_above_1": round((difference > 1).float().mean().item(), 4)}
        figures[name] = {"largest": int(difference.max()), "mean": round(difference.float().mean().item(), 3), **shares}
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as root:
        folder = write_photographs(Path(root, "pictures"), arguments.photographs, arguments.pictures)
        record = {
            "pictures": arguments.pictures,
            "pixels": list(PHOTOGRAPH),
            "bytes": round(statistics.mean(path.stat().st_size for path in folder.iterdir())),
            "batch_size": BATCH,
            "images_per_s": {name: measure(name, folder, arguments.rounds) for name in arguments.networks},
            "draft": {size: measure_draft(folder, size, min(200, arguments.pictures)) for size in (64, 224)},
            **environment(),
            "threads": usable_cores(),
        }
    if arguments.output is not None:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
