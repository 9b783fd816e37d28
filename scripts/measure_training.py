# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How fast do the networks train, and in how much memory? Beside transformers' ViT-S and Swin-T, in one run.

    python scripts/measure_training.py --device cuda --compile both --output results/training_cuda.json
    python scripts/measure_training.py --device cpu --networks vitae-t vitae-s --batch_size 16 --steps 3 \\
        --checkpointing both --output results/training_cpu.json

One step is forward, backward and AdamW on random images in memory, as `ViTAETrainer` runs it: bfloat16 autocast, TF32
and channels_last on a GPU, float32 and channels_last on a CPU. Each configuration has a process of its own, and they
take turns for `--rounds`; figures are medians over the steps of all rounds. Peak memory is what torch allocated on a
GPU, the resident memory of the process on a CPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from vitae_hf import PRESETS, config_from_preset
from vitae_hf.environment import environment
from vitae_hf.optimization import parameter_groups


OTHERS = {
    "vit-s": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    ),
    "swin-t": lambda: SwinForImageClassification(SwinConfig(num_labels=1000)),
}


def build(network: str):
    if network in OTHERS:
        return OTHERS[network]()
    return AutoModelForImageClassification.from_config(config_from_preset(network))


def measure(network: str, device: str, batch_size: int, steps: int, compiled: bool, checkpointing: bool) -> dict:
    """Seconds of each step after two to warm up, and the peak memory in MiB."""
    set_seed(0)
    on_gpu = device.startswith("cuda")
    torch.set_float32_matmul_precision("high")
    model = build(network).to(device, memory_format=torch.channels_last).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05), fused=True)
    run = torch.compile(model) if compiled else model
    side = model.config.image_size
    pixels = torch.randn(batch_size, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, model.config.num_labels, (batch_size,), device=device)
    seconds = []
    for step in range(2 + steps):
        if on_gpu:
            torch.cuda.synchronize()
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=on_gpu):
            loss = run(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"parameters": model.num_parameters(), "seconds": seconds[2:], "peak_mib": peak / 2**20}


def in_own_process(options: dict) -> dict:
    command = [sys.executable, __file__, "--one", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vitae-t", "vitae-s", "vitae-b", *OTHERS])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", choices=["off", "on", "both"], default="off")
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="off")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        return measure(**arguments.one)
    if unknown := set(arguments.networks) - {*PRESETS, *OTHERS}:
        parser.error(f"unknown networks {sorted(unknown)}; there are {[*PRESETS, *OTHERS]}")
    choices = {"off": [False], "on": [True], "both": [False, True]}
    configurations = [
        {
            "network": network,
            "device": arguments.device,
            "batch_size": arguments.batch_size,
            "steps": arguments.steps,
            "compiled": compiled,
            "checkpointing": checkpointing,
        }
        for network, compiled, checkpointing in product(
            arguments.networks, choices[arguments.compile], choices[arguments.checkpointing]
        )
    ]
    found = [[in_own_process(options) for options in configurations] for _ in range(arguments.rounds)]
    records = []
    for options, rounds in zip(configurations, zip(*found)):
        if errors := [measured["error"] for measured in rounds if "error" in measured]:
            records.append({**options, "error": errors[0]})
            continue
        step = statistics.median(second for measured in rounds for second in measured["seconds"])
        records.append(
            {
                **options,
                "parameters": rounds[0]["parameters"],
                "images_per_s": round(arguments.batch_size / step, 1),
                "peak_mib": round(max(measured["peak_mib"] for measured in rounds)),
            }
        )
    record = {"results": records, "rounds": arguments.rounds, **environment(arguments.device)}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    print(json.dumps(main()))
