# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How long do a search through embeddings and a probe of them take, and in how much memory?

    python scripts/measure_features.py --output results/features_cpu.json

The embeddings are random and in parts as `vitae predict --embeddings float16` writes them: parts of 2,048 rows. The
times of a search are the shortest of three; the processor's do not count what else the machine did. Memory is the peak
above what the process had before, whose libraries take about 800 MiB.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from vitae_hf.deployment.benchmarking import peak_memory
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json
from vitae_hf.prediction.neighbours import nearest
from vitae_hf.prediction.probing import probe


PART_ROWS = 2048


def write_parts(folder: Path, rows: int, width: int) -> None:
    generator = np.random.default_rng(0)
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        numbers = range(start, min(start + PART_ROWS, rows))
        values = generator.standard_normal((len(numbers), width), np.float32).astype(np.float16)
        columns = {
            "path": [f"{number % 1000:03}/{number:08}.jpg" for number in numbers],
            "label": [f"class {number % 1000}" for number in numbers],
            "error": pa.nulls(len(numbers), pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        }
        parquet.write_table(pa.table(columns), folder / f"part-{part:05}.parquet", use_dictionary=["label"])


def measure_search(rows: int, width: int, pictures: list[int]) -> dict[str, Any]:
    """Seconds by the number of pictures that are searched for at once, and memory."""
    seconds: dict[str, dict[int, float]] = {"seconds": {}, "processor_seconds": {}}
    generator = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # whose memory does not count
            other.submit(write_parts, Path(folder), rows, width).result()
        size, before = sum(part.stat().st_size for part in Path(folder).iterdir()), peak_memory("cpu")
        for count in pictures:
            queries, times = generator.standard_normal((count, width), np.float32), []
            for _ in range(3):
                started = time.perf_counter(), time.process_time()
                nearest(folder, queries, top_k=10)
                times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            for clock, measured in zip(seconds.values(), zip(*times)):
                clock[count] = round(min(measured), 2)
        memory = peak_memory("cpu") - before
    return {**seconds, "memory_mib": round(memory), "disk_mib": round(size / 2**20)}


def measure_probe(rows: int, width: int, classes: int) -> dict[str, Any]:
    """Seconds and memory of a probe whose classes overlap."""
    generator = np.random.default_rng(2)
    labels = np.arange(rows) % classes
    centres = 0.2 * generator.standard_normal((classes, width))
    embeddings = (centres[labels] + generator.standard_normal((rows, width))).astype(np.float32)
    started, before = (time.perf_counter(), time.process_time()), peak_memory("cpu")
    figures = probe(embeddings, [f"class {label}" for label in labels])
    return {
        "seconds": round(time.perf_counter() - started[0], 1),
        "processor_seconds": round(time.process_time() - started[1], 1),
        "memory_mib": round(peak_memory("cpu") - before),
        "top1_percent": round(figures["top1_percent"], 1),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="to search in; default: a million")
    parser.add_argument("--probe_rows", type=int, default=10_000, help="to probe; default: 10,000")
    parser.add_argument("--classes", type=int, default=10, help="of the probe; default: 10")
    parser.add_argument("--width", type=int, default=384, help="numbers in an embedding; default: 384")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 16], help="to search for at once")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    record = {
        **{name: getattr(arguments, name) for name in ("rows", "probe_rows", "classes", "width")},
        "search": measure_search(arguments.rows, arguments.width, arguments.pictures),
        "probe": measure_probe(arguments.probe_rows, arguments.width, arguments.classes),
        **environment(),
    }
    if arguments.output is not None:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
