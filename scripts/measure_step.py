# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How much time and memory does a step of training take, compared with the same networks written out plainly?

    python scripts/measure_step.py --output results/step_cpu.json

The plain networks are those of `tests/family/reference.py`, but with the statistics of the batch. Both have the golden
weights, no dropout and no drop path. A step is forward, cross-entropy and backward, in float32. The two take turns, and
the ratio of their times is the median over rounds. Memory is what the forward pass keeps for the backward pass.
"""

import argparse
import statistics
import sys
from unittest.mock import patch

import torch
from measure_parity import GOLDEN, golden_state_dict
from torch import nn
from transformers import AutoModelForImageClassification

from vitae_hf import config_from_preset, convert_original_state_dict
from vitae_hf.deployment.benchmarking import interleave, saved_bytes, spread
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json


sys.path.insert(0, str(GOLDEN.parent / "family"))
import reference  # noqa: E402


NO_NOISE = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0}


def batch_norm(weights: dict[str, torch.Tensor], name: str, feature_map: torch.Tensor) -> torch.Tensor:
    """BatchNorm with the batch's own statistics. It replaces the reference's, which is for evaluation."""
    scale_and_shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return nn.functional.batch_norm(feature_map, None, None, *scale_and_shift, training=True)


class Step:
    """Each call is a forward and a backward pass, always on the same images."""

    def __init__(self, logits, weights: list[torch.Tensor], batch_size: int, autocast: bool):
        self.logits, self.weights, self.autocast = logits, weights, autocast
        device, generator = weights[0].device, torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(batch_size, 3, 224, 224, generator=generator).to(device)
        self.labels = torch.arange(batch_size, device=device)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.labels.device.type, torch.bfloat16, self.autocast):
            logits = self.logits(self.pixel_values)
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> None:
        self.loss().backward()
        for weight in self.weights:
            weight.grad = None


def steps(preset: str, batch_size: int, device: str, autocast: bool) -> dict[str, Step]:
    """A step of the network that is written out plainly, and a step of ours."""
    original = {name: tensor.to(device) for name, tensor in golden_state_dict(preset).items()}
    is_v2 = preset.startswith("vitaev2")
    config = config_from_preset(preset, **NO_NOISE, **({} if is_v2 else {"reduction_dropout_prob": 0.0}))
    model = AutoModelForImageClassification.from_config(config)
    model.load_state_dict(convert_original_state_dict(original))
    model.to(device)
    fixed = ("running_mean", "running_var", "num_batches_tracked", "attn.w")
    plain = {name: tensor.requires_grad_(not name.endswith(fixed)) for name, tensor in original.items()}

    def plain_logits(pixel_values: torch.Tensor) -> torch.Tensor:
        # The device is where the plain networks make their grids.
        with patch.object(reference, "_batch_norm", batch_norm), torch.device(device):
            return (reference.logits_v2 if is_v2 else reference.logits)(plain, config, pixel_values)

    own = [*model.parameters(), *model.buffers()]
    return {
        "plain": Step(plain_logits, list(plain.values()), batch_size, autocast),
        "ours": Step(lambda pixels: model.train()(pixels).logits, own, batch_size, autocast),
    }


def measure(
    preset: str, batch_size: int, rounds: int, least_seconds: float = 1.0, device: str = "cpu", autocast: bool = False
) -> dict:
    """Measure the seconds of a step, the bytes kept for an image, and how many times as fast our step is.

    Raises:
        RuntimeError: a step fails, or the two networks differ in their losses.
    """
    both = steps(preset, batch_size, device, autocast)
    losses = {name: step.loss().item() for name, step in both.items()}
    if abs(losses["plain"] - losses["ours"]) > (1e-2 if autocast else 1e-4) * abs(losses["plain"]):
        raise RuntimeError(f"the two networks differ in their losses: {losses}")
    seconds, errors = interleave(both, rounds, least_seconds, device)
    if errors:
        raise RuntimeError(str(errors))
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "times_as_fast": spread([plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"])]),
        "saved_bytes_per_image": {
            name: saved_bytes(step.loss, step.weights) / batch_size for name, step in both.items()
        },
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["vitae-t", "vitae-s", "vitaev2-s"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    networks = {preset: measure(preset, arguments.batch_size, arguments.rounds) for preset in arguments.presets}
    record = {"networks": networks, "batch_size": arguments.batch_size, "rounds": arguments.rounds, **environment()}
    if arguments.output:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
