# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Does the architecture keep its promises? Small networks with pieces taken out, on pictures that are changed.

    make data-fashion-mnist
    python scripts/compare_claims.py --data data/fashion_mnist --processes 2 --output results/claims

Trains `vitae-nano`, `vitaev2-nano`, their ablations, Swin and ViT of equal size on garments of one size in the middle
of a frame, and tests them on garments that are larger, smaller, moved, turned or damaged. `--parts pieces` does so on
10 % of Fashion-MNIST, `--parts data` trains the whole networks on 1 to 100 %.

Every run ends when the accuracy on held-out training images has not risen for a while; the best average of the weights
until then counts, with statistics of BatchNorm that are its own. The learning rate of each network is chosen on the
same held-out images out of powers of two, such that its neighbours on both sides are no better. The test images only
give the final figures. A comparison that was stopped goes on after its last finished runs. Writes OUTPUT.json,
OUTPUT.md, pictures, and the weights into OUTPUT.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from claims_networks import NETWORKS, WHOLE
from claims_pictures import CHANGES, DAMAGES, FRAME, SHARE_OF_PIECES, Labelled, changed, digest, framed, load, share_of
from claims_report import write_report
from compare_pretraining import as_they_end
from kept_results import go_on, positive, read_results
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, update_bn
from transformers import PreTrainedModel, set_seed

from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json


RECIPE = {
    "batch_size": 64,
    "warmup_updates": 100,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "average_decay": 0.99,
    "statistics_images": 512,
    "updates_between_tests": 100,
    "held_out": 2000,
    "changed_test_images": 1000,
    "matched_percent": 82.0,
    "patience_epochs": 2,
}
FIRST_EXPONENTS = (0, 1, 2)  # of the learning rates that each network is tried with
LOWEST, HIGHEST = -5, 5
SEED_FOR_RATES = 1000  # the comparison uses others
SHARES = (0.01, 0.03, SHARE_OF_PIECES, 0.3, 1.0)
PARTS = ("pieces", "data")


def batches(images: Labelled, size: int) -> Iterator[Labelled]:
    """Random batches without end, each picture once in an epoch, every other one mirrored: values from -1 to 1."""
    pictures, labels = images
    while True:
        for chosen in torch.randperm(len(labels)).split(size):
            if len(chosen) == min(size, len(labels)):
                mirrored = torch.rand(len(chosen), 1, 1, 1) < 0.5
                batch = pictures[chosen]
                yield networks_input(torch.where(mirrored, batch.flip(-1), batch)), labels[chosen]


def networks_input(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) from 0 to 1 -> (N, 3, H, W) from -1 to 1."""
    return (pictures * 2 - 1).expand(-1, 3, -1, -1)


@torch.inference_mode()
def accuracy(network: PreTrainedModel, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent."""
    network.eval()
    other = {} if pictures.shape[-1] == FRAME else {"interpolate_pos_encoding": True}
    parts = zip(pictures.split(250), labels.split(250))
    right = sum((network(networks_input(x), **other).logits.argmax(1) == y).sum().item() for x, y in parts)
    return round(100 * right / len(labels), 3)


def takes(network: PreTrainedModel, size: int) -> bool:
    """Whether a network can run on frames of this side in pixels."""
    config = network.config
    if config.model_type == "swin":  # its last map must fill a window
        return size >= config.window_size * config.patch_size * 2 ** (len(config.depths) - 1)
    return size % getattr(config, "total_stride", config.patch_size) == 0


def optimizer_for(network: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; vectors and positions do not decay."""
    decaying, others = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (decaying if parameter.ndim > 1 and "position" not in name else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": RECIPE["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


@torch.no_grad()
def average(averages: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor) -> None:
    """Move an average of weights, which follows them fast at first."""
    decay = min(RECIPE["average_decay"], (1 + count.item()) / (10 + count.item()))
    torch._foreach_lerp_(averages, weights, 1 - decay)


class Training:
    """A run: the network, the average of its weights, and the accuracy of that on held-out images as it learns."""

    def __init__(self, settings: dict, images: Labelled, held_out: Labelled):
        set_seed(settings["seed"])
        self.network = NETWORKS[settings["network"]]()
        self.average = AveragedModel(self.network, multi_avg_fn=average)
        self.optimizer = optimizer_for(self.network, settings["learning_rate"])
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.01, 1.0, RECIPE["warmup_updates"])
        self.batches = batches(images, RECIPE["batch_size"])
        some = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(0))[: RECIPE["statistics_images"]]
        self.for_statistics = networks_input(images[0][some]).split(64)
        self.held_out = held_out
        self.curve: list[tuple[int, float, float]] = []  # pictures and processor seconds so far, accuracy
        self.best = self.average.module
        self.below, self.above = self.weights(), None  # of the tests around the accuracy that is to be matched

    def tested(self, network: PreTrainedModel) -> float:
        """The accuracy on held-out images of a network of averaged weights, once BatchNorm has statistics of them."""
        update_bn(self.for_statistics, network)
        return accuracy(network, *self.held_out)

    def weights(self) -> dict[str, torch.Tensor]:
        return copy.deepcopy(self.average.module.state_dict())

    def update(self) -> int:
        pictures, labels = next(self.batches)
        loss = cross_entropy(self.network(pictures).logits, labels, label_smoothing=RECIPE["label_smoothing"])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return len(labels)

    def run(self, tests: int, patience: int) -> None:
        """Train until the accuracy has not risen in the last `patience` tests, or there were `tests` of them."""
        seen, seconds, highest, since = 0, 0.0, -1.0, 0
        while len(self.curve) < tests and since < patience:
            start = time.process_time()
            self.network.train()
            seen += sum(self.update() for _ in range(RECIPE["updates_between_tests"]))
            seconds += time.process_time() - start
            top1 = self.tested(self.average.module)
            if self.above is None:
                if top1 < RECIPE["matched_percent"]:
                    self.below = self.weights()
                else:
                    self.above = self.weights()
            if top1 > highest:
                self.best, highest, since = copy.deepcopy(self.average.module), top1, 0
            else:
                since += 1
            self.curve.append((seen, round(seconds, 1), top1))

    def matched(self) -> PreTrainedModel | None:
        """The network when it had the accuracy that all are compared at, if it ever had.

        Between two tests the accuracy jumps, so that the weights of both are mixed, in the share that meets it best.
        """
        if self.above is None:
            return None
        network, wanted = copy.deepcopy(self.average.module), RECIPE["matched_percent"]
        low, high, tried = 0.0, 1.0, []
        for _ in range(6):
            share = (low + high) / 2
            network.load_state_dict(mixed(self.below, self.above, share))
            top1 = self.tested(network)
            tried.append((abs(top1 - wanted), share))
            low, high = (share, high) if top1 < wanted else (low, share)
        network.load_state_dict(mixed(self.below, self.above, min(tried)[1]))
        update_bn(self.for_statistics, network)
        return network


def mixed(below: dict, above: dict, share: float) -> dict[str, torch.Tensor]:
    """Weights between two others; what is no fraction, such as a count, is of the second."""
    return {
        name: torch.lerp(below[name], value, share) if value.is_floating_point() else value
        for name, value in above.items()
    }


def curves(network: PreTrainedModel, images: Labelled, changes: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
    """Accuracy on changed test images, by change and strength; none where the network cannot take the size."""
    pictures, labels = (part[: RECIPE["changed_test_images"]] for part in images)
    found: dict[str, dict[str, float | None]] = {}
    for change in changes:
        found[change] = {}
        for strength, make in changed(pictures, change).items():
            is_possible = change != "resolution" or takes(network, int(strength))
            found[change][str(strength)] = accuracy(network, make(), labels) if is_possible else None
    return found


def train_once(settings: dict) -> dict:
    """One run: its curve, its accuracy on the test images, and for `--parts pieces` that on changed ones."""
    torch.set_num_threads(1)  # in a process of its own it has one; seconds are those of a core
    rest, kept, test = load(settings["data"], RECIPE["held_out"])
    images = share_of(rest, settings["share"], settings["seed"])
    training = Training(settings, (framed(images[0]), images[1]), (framed(kept[0]), kept[1]))
    epochs = math.ceil(
        RECIPE["patience_epochs"] * len(images[1]) / RECIPE["batch_size"] / RECIPE["updates_between_tests"]
    )
    training.run(settings["tests"], max(settings["patience"], epochs))
    record = {"curve": training.curve, "held_out_percent": max(top1 for *_, top1 in training.curve)}
    if settings["part"] == "rates":
        return record
    keep(training.best, settings)
    record["top1_percent"] = accuracy(training.best, framed(test[0]), test[1])
    if settings["share"] == SHARE_OF_PIECES:
        record["curves"] = curves(training.best, test, tuple(CHANGES))
        if (matched := training.matched()) is not None:
            keep(matched, settings, "matched")
            record["matched"] = curves(matched, test, DAMAGES)
            record["matched"]["top1_percent"] = accuracy(matched, framed(test[0]), test[1])
    return record


def keep(network: PreTrainedModel, settings: dict, *more: str) -> None:
    """Save the weights of a run, so that they can be tested in other ways too."""
    settings["weights"].mkdir(parents=True, exist_ok=True)
    words = [settings["network"], f"{settings['share']:g}", f"{settings['seed']}", *more]
    save_file(network.state_dict(), settings["weights"] / f"{' '.join(words)}.safetensors")


class Comparison:
    """The runs so far, kept in a JSON file after each.

    Raises:
        ValueError: the runs in the file were made otherwise.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.path = arguments, arguments.output.with_suffix(".json")
        kept = [] if arguments.rates_from is None else read_results(arguments.rates_from, "rates")["rates"]
        data = digest(load(arguments.data, RECIPE["held_out"]))
        new = {"recipe": RECIPE, "data": data, "parameters": {}, "rates": kept, "runs": []}
        self.results = go_on(self.path, new, "recipe", "data")
        for name in arguments.networks:
            parameters = NETWORKS[name]().num_parameters()
            if self.results["parameters"].setdefault(name, parameters) != parameters:
                raise ValueError(f"{self.path} is of another {name}: choose another --output")
        self.refuse_others({"tests": arguments.tests, "patience": arguments.patience})

    def refuse_others(self, settings: dict, network: str | None = None) -> None:
        """See that the runs, of one network or of all, were made with these settings.

        Raises:
            ValueError: one was not.
        """
        for run in self.results["runs"]:
            if network in (None, run["network"]) and not settings.items() <= run.items():
                ours, theirs = (" and ".join(f"{name} {of[name]}" for name in settings) for of in (settings, run))
                raise ValueError(
                    f"{self.path} has runs of {run['network']} with {theirs}, not {ours}: choose another --output"
                )

    def save(self) -> None:
        self.results.update({**environment(), "processes": self.arguments.processes})
        write_json(self.results, self.path, indent=None)  # thousands of numbers
        write_report(self.results, self.path)

    def do(self, kind: str, runs: list[dict]) -> list[dict]:
        """The records of these runs; those that have not been done before are done."""
        records = self.results[kind]
        jobs = {
            tuple(run.items()): {**run, "data": self.arguments.data, "part": kind, "weights": self.path.with_suffix("")}
            for run in runs
            if not any(run.items() <= record.items() for record in records)
        }
        for run, figures in as_they_end(train_once, jobs, self.arguments.processes):
            records.append({**dict(run), **figures})
            self.save()
            print(json.dumps({**dict(run), "held_out_percent": figures["held_out_percent"]}), flush=True)
        return [record for run in runs for record in records if run.items() <= record.items()]

    def choose_rates(self) -> dict[str, float]:
        """For each network the power of two, times 0.001, whose neighbours on both sides are no better.

        Raises:
            ValueError: there is none from `LOWEST` to `HIGHEST`.
        """
        arguments = self.arguments
        settings = {"share": SHARE_OF_PIECES, "seed": SEED_FOR_RATES}
        settings |= {"tests": arguments.rate_tests, "patience": arguments.rate_tests}
        tried = dict.fromkeys(arguments.networks, FIRST_EXPONENTS)
        while True:
            runs = [
                {"network": network, "learning_rate": 1e-3 * 2.0**exponent, **settings}
                for network, exponents in tried.items()
                for exponent in exponents
            ]
            records = self.do("rates", runs)
            rates, wider = {}, {}
            for network, exponents in tried.items():
                mine = [record for record in records if record["network"] == network]
                best = max(range(len(mine)), key=lambda index: mine[index]["held_out_percent"])
                rates[network] = mine[best]["learning_rate"]
                first, last = exponents[0] - (best == 0), exponents[-1] + (best == len(mine) - 1)
                wider[network] = tuple(range(first, last + 1))
            if wider == tried:
                return rates
            if any(exponents[0] < LOWEST or exponents[-1] > HIGHEST for exponents in wider.values()):
                raise ValueError(
                    f"the best learning rate is beyond {1e-3 * 2**LOWEST:g} to {1e-3 * 2**HIGHEST:g}: {rates}"
                )
            tried = wider


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of `make data-fashion-mnist`, or the like")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=list(SHARES), help="of --parts data")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--tests", type=positive, default=300, help="how often a run is tested on held-out images at most"
    )
    parser.add_argument(
        "--patience",
        type=positive,
        default=6,
        help="how many tests without a higher accuracy end a run; at least some epochs",
    )
    parser.add_argument(
        "--rate_tests", type=positive, default=5, help="how long the runs are that choose a learning rate"
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--learning_rate", type=float, help="of all networks, in place of choosing one for each")
    rates.add_argument("--rates_from", type=Path, help="JSON file of a comparison that chose the learning rates")
    parser.add_argument("--processes", type=positive, default=1, help="how many runs go on at once, in one thread each")
    arguments = parser.parse_args(argv)
    comparison = Comparison(arguments)
    one_rate = dict.fromkeys(arguments.networks, arguments.learning_rate)
    rates = comparison.choose_rates() if arguments.learning_rate is None else one_rate
    for network, rate in rates.items():
        comparison.refuse_others({"learning_rate": rate}, network)
    length = {"tests": arguments.tests, "patience": arguments.patience}
    shares = {"pieces": [SHARE_OF_PIECES], "data": arguments.shares}
    for part in arguments.parts:
        networks = [network for network in arguments.networks if part == "pieces" or network in WHOLE]
        runs = [  # a share before the next, and all networks with a seed: so a stopped comparison is fair
            {"network": network, "share": share, "learning_rate": rates[network], "seed": seed, **length}
            for share in shares[part]
            for seed in arguments.seeds
            for network in networks
        ]
        comparison.do("runs", runs)
    comparison.save()
    return {"runs": len(comparison.results["runs"]), "learning_rates": rates, **environment()}


if __name__ == "__main__":
    run_command(main)
