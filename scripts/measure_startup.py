# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How long until the first picture is classified? Importing, loading, preparing, and the first and the later images.

    python scripts/measure_startup.py --output results/startup_cpu.json

Each network is loaded from a folder in a fresh process, several times in turn, and sees one image at a time in float32.
Every model of the library imports torch and transformers first, `swin-t` too. Values are medians in seconds; a later
image is in milliseconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from vitae_hf import PRESETS
from vitae_hf.deployment.benchmarking import build_network
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json


SIZES = {"vitae-nano": 64, "vitae-t": 224, "vitae-s": 224, "vitaev2-s": 224, "swin-t": 224}
STAGES = """
import json, sys, time
folder, side, threads, is_ours = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "ours"
seconds, started = {}, time.perf_counter()

def lap(stage):
    global started
    seconds[stage], started = time.perf_counter() - started, time.perf_counter()

import torch
torch.set_num_threads(threads)
lap("import torch")
from transformers import AutoModelForImageClassification, PreTrainedModel
lap("import transformers")
if is_ours:
    from vitae_hf import prepare_for_inference
lap("import vitae_hf")
model = AutoModelForImageClassification.from_pretrained(folder).eval()
lap("load")
if is_ours:
    model = prepare_for_inference(model)
lap("prepare")
image = torch.randn(1, 3, side, side)
with torch.inference_mode():
    model(image)
    lap("first image")
    for index in range(40):
        model(image)
        lap(f"later {index}")
print(json.dumps(seconds))
"""
LATER = 10
"""Images after the first that are not counted, since caches still fill."""


def measure(network: str, folder: Path, threads: int) -> dict[str, float]:
    """Seconds of each stage in a process of its own, and the milliseconds of a later image."""
    ours = "ours" if network in PRESETS else "another"
    command = [sys.executable, "-c", STAGES, str(folder), str(SIZES[network]), str(threads), ours]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{network} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    seconds: dict[str, float] = json.loads(done.stdout)
    later = [seconds.pop(stage) for stage in list(seconds) if stage.startswith("later")]
    return {**seconds, "later image, ms": 1000 * statistics.median(later[LATER:])}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the measurement
    rounds: dict[str, list[dict[str, float]]] = {network: [] for network in arguments.networks}
    with tempfile.TemporaryDirectory() as folder:
        for network in arguments.networks:
            build_network(network, (SIZES[network], SIZES[network])).save_pretrained(Path(folder, network))
        for _ in range(arguments.rounds):
            for network, found in rounds.items():
                found.append(measure(network, Path(folder, network), arguments.threads))
    medians = {
        network: {stage: round(statistics.median(one[stage] for one in found), 4) for stage in found[0]}
        for network, found in rounds.items()
    }
    record = {"seconds": medians, "rounds": arguments.rounds, **environment(), "threads": arguments.threads}
    write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
