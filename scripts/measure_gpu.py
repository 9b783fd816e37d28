# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""All that a GPU must show, in one command of less than nine minutes.

    python scripts/measure_gpu.py --output results/gpu             # `make gpu`
    python scripts/measure_gpu.py --list                           # what it would run, and the seconds planned for it
    python scripts/measure_gpu.py --output results/gpu --resume    # go on where it was interrupted
    python scripts/measure_gpu.py --miniature --output outputs/gpu # every part on a CPU, in less than a minute

Needs a checkout (`make gpu` sets PYTHONPATH) and torch, torchvision, transformers, timm, accelerate, pyarrow and
matplotlib. It writes OUTPUT.json after every row, and OUTPUT.md and pictures after every part. A part that takes half
as long again as planned is ended; what it has measured by then is kept.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gpu_parts
import torch
from gpu_parts import MINIATURE, Plan
from matplotlib.figure import Figure

from vitae_hf.commands.benchmark import ways_of
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import write_json, write_text


@dataclass(frozen=True)
class Part:
    """A measurement: what it is called in the files, the seconds planned for it, the columns of its table."""

    title: str
    seconds: int
    columns: tuple[str, ...]


SPEED = ("network", "how", "batch_size", "images_per_s", "relative_efficiency", "peak_mib", "peak_tflops")
PARTS = {
    "parity": Part(
        "Distance from the authors' logits",
        40,
        ("network", "dtype", "max_over_std", "max_over_range", "finite_at_100_times"),
    ),
    "attention": Part("Backends of softmax attention", 30, ("network", "attention", "max_over_std", "images_per_s")),
    "one_process": Part(
        "Distributed training with one process", 15, ("network", "kind", "loss_minus_plain", "images_per_s")
    ),
    "fashion_mnist": Part("A short run on Fashion-MNIST", 45, ("network", "size", "epoch", "top1_percent", "seconds")),
    "compiling": Part(
        "The first call of what is compiled", 100, ("network", "mode", "batch_size", "first_call_seconds")
    ),
    "training": Part("Training under bfloat16 autocast", 60, SPEED),
    "training_compiled": Part("Training, compiled", 80, SPEED),
    "inference": Part("Inference in bfloat16", 80, SPEED),
    "plain_networks": Part(
        "A step of training beside the plain networks",
        30,
        ("network", "batch_size", "plain_ms", "ours_ms", "times_as_fast"),
    ),
    "kernels": Part("Where a step of training spends its time", 20, ("network", "kind", "kernel", "ms", "share")),
    "input_path": Part("The way of the pictures to the device", 25, ("step", "images_per_s")),
}
"""In the order in which they run. What is not timed comes first, while other processes compile."""


@dataclass(frozen=True)
class Goal:
    """A figure that should be reached on one H100: the value `figure` of the row of `part` that has these `fields`."""

    says: str
    part: str
    fields: dict
    figure: str
    least: float


GOALS = [
    Goal("ViTAE-S trains, compiled", "training_compiled", {"network": "vitae-s"}, "images_per_s", 3500),
    Goal("ViTAEv2-S trains, compiled", "training_compiled", {"network": "vitaev2-s"}, "images_per_s", 1690),
    *(
        Goal(f"{name}'s inference, prepared and compiled, over ViT-S", "inference",
             {"network": network, "batch_size": 128, "compiled": True}, "relative_efficiency", 0.7)
        for name, network in (("ViTAE-S", "vitae-s"), ("ViTAEv2-S", "vitaev2-s"))
    ),
    *(
        Goal(f"{name}'s step over the plain network's", "plain_networks", {"network": network}, "times_as_fast", 2)
        for name, network in (("ViTAE-T", "vitae-t"), ("ViTAE-S", "vitae-s"), ("ViTAEv2-S", "vitaev2-s"))
    ),
]  # fmt: skip


class OutOfTime(BaseException):
    """The time of a part is up. No `Exception`, so that it ends the part and not only the network being measured."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block when the seconds are over."""

    def stop(*_):
        raise OutOfTime(f"ended after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Report:
    """The figures, and the files that hold them: OUTPUT.json, OUTPUT.md and pictures."""

    def __init__(self, output: Path, plan: Plan, resume: bool):
        self.path, self.plan = output.with_suffix(".json"), plan
        output.parent.mkdir(parents=True, exist_ok=True)
        self.record = {"parts": {}}
        if resume and self.path.exists():
            self.record = json.loads(self.path.read_text(encoding="utf-8"))
        self.record |= environment(plan.device)

    def is_done(self, name: str) -> bool:
        return self.record["parts"].get(name, {}).get("ended") == "whole"

    def measure(self, name: str, rows: Iterator[dict], seconds: float) -> None:
        """Take the rows of a part, for so many seconds at most, and save each."""
        part = self.record["parts"][name] = {"planned_seconds": PARTS[name].seconds, "rows": [], "ended": "interrupted"}
        started = time.perf_counter()
        try:
            with at_most(seconds):
                for row in rows:
                    part["rows"].append(row)
                    write_json(self.record, self.path)
            part["ended"] = "whole"
        except (Exception, OutOfTime) as error:  # the other parts can still be measured
            part["ended"] = gpu_parts.error_in_a_line(error)
        finally:
            part["seconds"] = round(time.perf_counter() - started, 1)
            write_json(self.record, self.path)
            write_text(self.markdown(), self.path.with_suffix(".md"))
            print(f"\n{self.section(name)}", flush=True)

    def goals(self) -> list[dict]:
        """Each goal with the value that was measured, or none."""
        found = []
        for goal in GOALS:
            rows = [row for row in self.record["parts"].get(goal.part, {}).get("rows", []) if goal.figure in row]
            rows = [row for row in rows if all(row[name] == value for name, value in goal.fields.items())]
            value = median(rows[0][goal.figure]) if rows else None
            found.append({"goal": goal.says, "at least": goal.least, "measured": value})
        return found

    def section(self, name: str) -> str:
        part, rows = PARTS[name], self.record["parts"][name]
        end = "" if rows["ended"] == "whole" else f"; not whole: {rows['ended']}"
        heading = f"## {part.title}\n\n{rows.get('seconds', 0)} s, planned {part.seconds} s{end}\n\n"
        return heading + markdown_table(rows["rows"], part.columns)

    def markdown(self) -> str:
        where = ", ".join(
            f"{name} {self.record[name]}" for name in ("device", "torch", "transformers", "commit", "date")
        )
        goals = markdown_table(self.goals(), ("goal", "at least", "measured"))
        sections = [self.section(name) for name in PARTS if name in self.record["parts"]]
        return "\n".join([f"# What a GPU showed\n\n{where}\n\n## Goals\n\n{goals}", *sections])


def median(value):
    return value["median"] if isinstance(value, dict) else value


def how(row: dict) -> str:
    """In words, how a network of a speed measurement runs."""
    return ", ".join(ways_of(row)) or "as loaded"


def cell(value) -> str:
    value = median(value)
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: list[dict], columns: tuple[str, ...]) -> str:
    """A row for each that has figures, and a line for each that has an error."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" not in row:
            values = {"how": how(row), **row}
            lines.append("| " + " | ".join(cell(values.get(name)) for name in columns) + " |")
    errors = [
        ", ".join(cell({"how": how(row), **row}.get(name)) for name in columns[:3]) for row in rows if "error" in row
    ]
    failed = [row["error"] for row in rows if "error" in row]
    return "\n".join([*lines, "", *(f"- {what}: {error}" for what, error in zip(errors, failed))]).rstrip() + "\n"


def draw_speeds(parts: dict, path: Path) -> None:
    """Bars for each network, one for each way in which it ran: speed of training and inference, memory of training."""
    names = ("training", "training_compiled", "inference")
    rows = [row for name in names for row in parts.get(name, {}).get("rows", []) if "error" not in row]
    panels = {}  # by its title, the rows and which of their figures is drawn
    for row in rows:
        title = f"{row['mode']}, batch {row['batch_size']}: images per second"
        panels.setdefault(title, ("images_per_s", []))[1].append(row)
    if weighed := [row for row in rows if row["mode"] == "training" and "peak_mib" in row]:
        panels["training: peak memory (MiB)"] = "peak_mib", weighed
    if not panels:
        return
    figure = Figure(figsize=(13, 3.8 * len(panels)), layout="constrained")
    for axis, (title, (name, own)) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels.items()):
        bars(axis, own, name, title)
    figure.savefig(path, dpi=120)


def bars(axis, rows: list[dict], figure: str, title: str) -> None:
    """A group of bars for each network; the colour says how it ran."""
    networks, ways = (list(dict.fromkeys(names)) for names in ([row["network"] for row in rows], map(how, rows)))
    for idx, way in enumerate(ways):
        places = [networks.index(row["network"]) + idx / (len(ways) + 1) for row in rows if how(row) == way]
        drawn = axis.bar(places, [row[figure] for row in rows if how(row) == way], 0.9 / (len(ways) + 1), label=way)
        axis.bar_label(drawn, fmt="{:,.0f}", fontsize=7)
    axis.set_xticks([place + (len(ways) - 1) / (2 * len(ways) + 2) for place in range(len(networks))], networks)
    axis.set_title(title)
    axis.legend()


def draw_kernels(parts: dict, path: Path) -> None:
    """For each network a bar of its step of training, divided by kind of kernel."""
    rows = [row for row in parts.get("kernels", {}).get("rows", []) if "share" in row]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    if not networks:
        return
    figure = Figure(figsize=(13, 1.6 + 0.9 * len(networks)), layout="constrained")
    axis, left = figure.subplots(), dict.fromkeys(networks, 0.0)
    for colour, kind in enumerate([*gpu_parts.KINDS, "other"]):
        widths = [
            next((row["ms"] for row in rows if (row["network"], row["kind"]) == (name, kind)), 0) for name in networks
        ]
        axis.barh(networks, widths, left=list(left.values()), label=kind, color=f"C{colour}")
        left = {name: left[name] + width for name, width in zip(networks, widths)}
    axis.set_title("a step of training: milliseconds by kind of kernel")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def measure(arguments: argparse.Namespace, plan: Plan) -> dict:
    """Run the parts one after the other. Those for which too little time is left are not begun."""
    output, started = arguments.output, time.perf_counter()
    report = Report(output, plan, arguments.resume)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops it gets what was measured
    names = [name for name in arguments.parts if not report.is_done(name)]
    processes = gpu_parts.compile_in_background(plan) if "compiling" in names else {}
    inputs: dict[str, Callable] = {
        "compiling": partial(gpu_parts.compiling, processes=processes),
        "fashion_mnist": partial(gpu_parts.fashion_mnist, picture=output.with_name(f"{output.stem}_fashion_mnist.png")),
    }
    try:
        for name in names:
            left = arguments.seconds - (time.perf_counter() - started)
            if left < PARTS[name].seconds / 2:
                print(f"{name} is left out: {max(left, 0):.0f} s are left, {PARTS[name].seconds} s are planned for it")
                continue
            rows = inputs.get(name, getattr(gpu_parts, name))(plan)
            report.measure(name, rows, min(left, 1.5 * PARTS[name].seconds))
            draw_speeds(report.record["parts"], output.with_name(f"{output.stem}_speed.png"))
            draw_kernels(report.record["parts"], output.with_name(f"{output.stem}_kernels.png"))
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on: {report.path} has what was measured", file=sys.stderr)
    finally:
        for process in processes.values():
            process.kill()
    ended = {name: part["ended"] for name, part in report.record["parts"].items()}
    return {"output": str(report.path), "parts": ended, "goals": report.goals()} | environment(plan.device)


def status(record: dict) -> int:
    """130, as after Ctrl-C everywhere, if a part was interrupted."""
    return 130 if "interrupted" in record.get("parts", {}).values() else 0


def list_parts(seconds: float) -> None:
    for name, part in PARTS.items():
        print(f"{part.seconds:4d} s  {name:18} {part.title}")
    print(f"{sum(part.seconds for part in PARTS.values()):4d} s  planned in all, of {seconds:.0f}")


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/gpu"), help="files to write; default: results/gpu")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="default: all"
    )
    parser.add_argument("--resume", action="store_true", help="keep the parts that OUTPUT.json has whole")
    parser.add_argument("--seconds", type=float, default=530, help="in all; default: 530")
    parser.add_argument("--miniature", action="store_true", help="tiny networks on a CPU")
    parser.add_argument("--list", action="store_true", help="print the parts and the seconds planned for each")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # the work of one of the processes beside this one
    arguments = parser.parse_args(argv)
    if arguments.compile:
        return gpu_parts.compile_setups(json.loads(arguments.compile))
    if arguments.list:
        return list_parts(arguments.seconds)
    if not arguments.miniature and not torch.cuda.is_available():
        raise ValueError("there is no GPU that torch can use; --miniature runs every part on a CPU")
    return measure(arguments, MINIATURE if arguments.miniature else Plan())


if __name__ == "__main__":
    run_command(main, status=status)
