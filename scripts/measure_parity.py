# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How far are we from the authors' networks on this device, in float32 and in half precision?

    python scripts/measure_parity.py --device cuda --output results/parity_cuda.json

Compares logits with the golden data of the tests. `max_over_std` is the largest difference over the standard deviation
of the logits, `rms_over_std` the root mean square difference over the same, and `max_over_range` the largest difference
over the range of the logits.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from vitae_hf import config_from_preset, convert_original_state_dict
from vitae_hf.environment import environment
from vitae_hf.failures import device, run_command
from vitae_hf.files import output_file, write_json


GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
import golden_weights  # noqa: E402


# By preset: names of the key list and of the golden data, where these are not the preset's own.
GOLDEN_NAMES = {"vitae-b-rvsa": ("rvsa-vitae-b_cls", "rvsa-vitae-b_cls51")}
PRESETS = ("vitae-t", "vitae-6m", "vitae-s", "vitae-b", "vitae-b-rvsa", "vitaev2-s")


def golden_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint of the authors, by name."""
    lines = (GOLDEN / "keys" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith(("#", "name\t")))
    return {key: () if shape == "-" else tuple(map(int, shape.split("x"))) for key, shape, _ in rows}


def golden_state_dict(name: str) -> dict[str, torch.Tensor]:
    """The weights that the golden data of a checkpoint were computed with, in the authors' format."""
    return {
        key: torch.from_numpy(np.asarray(golden_weights.tensor(key, shape)))
        for key, shape in golden_shapes(name).items()
        if not key.endswith("relative_position_index")  # a table that no network reads
    }


def errors(logits: torch.Tensor, expected: np.ndarray) -> dict:
    difference = logits.float().cpu().numpy() - expected
    return {
        "finite": bool(np.isfinite(difference).all()),
        "max_over_std": float(np.abs(difference).max() / expected.std()),
        "rms_over_std": float(np.sqrt((difference**2).mean()) / expected.std()),
        "max_over_range": float(np.abs(difference).max() / np.ptp(expected)),
    }


@torch.no_grad()
def measure(name: str, device: str) -> dict:
    """The errors of one variant in each dtype, and whether logits stay finite for images of 100 times the values."""
    keys, data = GOLDEN_NAMES.get(name, (name, name))
    expected = np.load(GOLDEN / f"{data}_224_seed0.npz")["logits"]
    images = torch.from_numpy(golden_weights.images(2, 224, 224)).to(device)
    record = {}
    with TemporaryDirectory() as folder:
        model = AutoModelForImageClassification.from_config(config_from_preset(name, num_labels=expected.shape[1]))
        model.load_state_dict(convert_original_state_dict(golden_state_dict(keys)))
        model.save_pretrained(folder)
        for dtype in ("float32", "bfloat16", "float16"):
            model = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).to(device).eval()
            record[dtype] = errors(model(images).logits, expected)
            record[dtype]["finite_at_100_times"] = bool(model(100 * images).logits.isfinite().all())
    return record


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    record = {
        "errors": {name: measure(name, arguments.device) for name in arguments.presets},
        **environment(arguments.device),
    }
    if arguments.output:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
