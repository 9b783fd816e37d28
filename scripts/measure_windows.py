# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What do windows that move, scale and turn cost, compared with plain ones, and where does their time go?

    python scripts/measure_windows.py --output results/windows_cpu.json

The networks are `vitae-b-rvsa`, the same with keys and values sampled apart, and the same with plain windows, which
see where tokens lie or do not. All have random weights and take turns; the ratio of two times is the median over the
rounds. The parts of a forward pass are timed in runs of their own. What a part calls counts for what is called.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from vitae_hf import ViTAEForImageClassification, config_from_preset
from vitae_hf.attention_vitae import ViTAEAttention, ViTAERelativePositions
from vitae_hf.deployment.benchmarking import interleave, spread
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json
from vitae_hf.layers_vitae import ViTAEMLP, ViTAENormalConvBranch
from vitae_hf.rotated_windows_vitae import ViTAERotatedWindowAttention, ViTAEWindowPredictor


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {"window_type": "plain"},
    "plain, blind": {"window_type": "plain", "use_rel_pos": False},
    "rotated": {},
    "rotated apart": {"window_type": "rotated_apart"},
}
PARTS: dict[str, list[tuple[type, str]]] = {
    "where a window looks": [(ViTAEWindowPredictor, "forward")],
    "sampling keys and values": [(ViTAERotatedWindowAttention, "sample")],
    "relative positions": [(ViTAERelativePositions, "forward"), (ViTAERotatedWindowAttention, "score_bias")],
    "scores, softmax, output": [(ViTAEAttention, "attend")],
    "projections, cutting windows": [(ViTAEAttention, "forward"), (ViTAERotatedWindowAttention, "forward")],
    "convolution branch": [(ViTAENormalConvBranch, "forward")],
    "MLP": [(ViTAEMLP, "forward")],
    "the rest": [(ViTAEForImageClassification, "forward")],
}


class Clock:
    """Seconds of each part of a forward pass, without those of the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.running = ["nothing"]
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Count the time since the last switch for the part that was running."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*inputs: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(part)
            try:
                return function(*inputs, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return wrapper


def shares(run: Callable[[], Any], passes: int) -> dict[str, float]:
    """The share of each part in the time of a forward pass, the largest first."""
    clock = Clock()
    with ExitStack() as stack:
        for part, methods in PARTS.items():
            for owner, name in methods:
                stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        for _ in range(passes):
            run()
    del clock.seconds["nothing"]
    return {part: seconds / clock.seconds.total() for part, seconds in clock.seconds.most_common()}


class Pass:
    """Each call is a forward pass, always of the same images."""

    def __init__(self, fields: dict[str, Any], size: int, dtype: str, batch_size: int):
        torch.manual_seed(0)
        config = config_from_preset("vitae-b-rvsa", image_size=size, **fields)
        self.model = ViTAEForImageClassification(config).to(getattr(torch, dtype)).eval()
        self.pixel_values = torch.randn(batch_size, 3, size, size, dtype=self.model.dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(self.pixel_values)


def measure(size: int, dtype: str, batch_size: int, rounds: int, least_seconds: float) -> dict[str, dict]:
    """Seconds of a forward pass of each network, over those of the plain windows too, and the shares of its parts.

    Raises:
        RuntimeError: a network fails.
    """
    passes = {name: Pass(fields, size, dtype, batch_size) for name, fields in NETWORKS.items()}
    seconds, errors = interleave(passes, rounds, least_seconds, "cpu")
    if errors:
        raise RuntimeError(str(errors))
    return {
        name: {
            "seconds": statistics.median(times),
            "over_plain": spread([own / plain for own, plain in zip(times, seconds["plain"])]),
            "shares": shares(passes[name], rounds),
        }
        for name, times in seconds.items()
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each network in each round, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    record = {
        "networks": {
            f"{size}, {dtype}": measure(size, dtype, arguments.batch_size, arguments.rounds, arguments.seconds)
            for size in arguments.sizes
            for dtype in arguments.dtypes
        },
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        **environment(),
    }
    if arguments.output:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
