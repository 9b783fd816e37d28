# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Do networks bear damage better when BatchNorm has the statistics of damaged pictures?

    python scripts/compare_claims.py --data data/fashion_mnist --output results/claims_same_rate --parts pieces \\
        --networks vitae-nano vitaev2-nano --learning_rate 0.008
    python scripts/measure_statistics.py results/claims_same_rate --data data/fashion_mnist \\
        --output results/claims_statistics.json

Takes the weights that the first command keeps, and tests every network on damaged test images twice: as it was
trained, and with statistics of 512 training images that are damaged in the same way. Labels are not needed for that.
"""

import argparse
import copy
import statistics
from pathlib import Path

from claims_networks import NETWORKS
from claims_pictures import DAMAGES, SHARE_OF_PIECES, changed, load
from compare_claims import RECIPE, accuracy, networks_input
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json
from vitae_hf.model_folders import read_header


def twice(network, damage: str, test, others) -> dict[str, list[float]]:
    """Top-1 in percent by strength of a damage: as trained, and with statistics of other pictures, damaged so too."""
    pictures, labels = test
    found = {}
    for (strength, make), damaged in zip(changed(pictures, damage).items(), changed(others, damage).values()):
        adapted = copy.deepcopy(network)
        update_bn(networks_input(damaged()).split(64), adapted)
        tested = make()
        found[str(strength)] = [accuracy(one, tested, labels) for one in (network, adapted)]
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder of weights that `compare_claims.py` kept")
    parser.add_argument("--data", type=Path, required=True, help="the data that they were trained on")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args(argv)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rest, _, test = load(arguments.data, RECIPE["held_out"])
    files = [
        path
        for path in sorted(arguments.weights.glob(f"* {SHARE_OF_PIECES} *.safetensors"))
        if not path.stem.endswith("matched")
    ]
    if not files:
        raise ValueError(f"{arguments.weights} has no weights that `compare_claims.py` kept")
    test = tuple(part[: RECIPE["changed_test_images"]] for part in test)
    others, runs = rest[0][: RECIPE["statistics_images"]], []
    for path in files:
        name, _, seed = path.stem.rsplit(" ", 2)
        if name not in NETWORKS:
            raise ValueError(f"{path} is of no network of this comparison")
        network = NETWORKS[name]()
        if read_header(path) != {key: tuple(value.shape) for key, value in network.state_dict().items()}:
            raise ValueError(f"{path} has other weights than {name}")
        network.load_state_dict(load_file(path))
        runs.append({"network": name, "seed": int(seed), **{d: twice(network, d, test, others) for d in DAMAGES}})
        write_json({"runs": runs, **environment()}, arguments.output)
    return {"output": str(arguments.output), **means(runs)}


def means(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Top-1 of each network over its seeds and the strengths of each damage, both ways."""
    found = {}
    for name in {run["network"]: None for run in runs}:
        pairs = {d: [pair for run in runs if run["network"] == name for pair in run[d].values()] for d in DAMAGES}
        found[name] = {d: [round(statistics.mean(way), 1) for way in zip(*those)] for d, those in pairs.items()}
    return found


if __name__ == "__main__":
    run_command(main)
