# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How fast are the networks, and how much memory do they take, beside those of transformers and timm?

    vitae benchmark --networks vitae-s vitaev2-s swin-t timm:convnext_tiny --batch_size 8 --threads 2
    vitae benchmark --size 224 --size 448 --size 800 1216 --mode inference training
    vitae benchmark --device cuda --mode training --dtype autocast --batch_size 128 --channels_last \\
        --compile both --checkpointing both --output results/training_cuda

Networks with the same mode, dtype, size and batch size form a group. They take turns in one process, `--rounds` times,
and ratios are taken within a round. Memory is measured in a process for each network. A network that cannot run is
listed with its error. After every group the command writes OUTPUT.json, OUTPUT.md and OUTPUT.png (curves if there are
three or more sizes or batch sizes, bars otherwise). In a checkout, `make bench`, `make bench-sweep` and `make
bench-dense` write the files in `results/`. The docstring of `vitae_hf.deployment.benchmarking` defines the figures.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .. import PRESETS
from ..deployment.benchmarking import (
    OTHER_NETWORKS,
    PRECISIONS,
    Setup,
    error_in_a_line,
    is_known,
    measure_memory,
    measure_speed,
)
from ..environment import environment
from ..failures import device
from ..files import write_json, write_text
from . import command_parser


YES_NO_BOTH: dict[str, list[bool]] = {"no": [False], "yes": [True], "both": [False, True]}
# The fields that the networks of a group share, and how their values are written.
GROUPED_BY: dict[str, Callable[[Any], str]] = {
    "mode": str,
    "dtype": str,
    "image_size": lambda size: f"{size[0]}×{size[1]}",
    "batch_size": lambda batch_size: f"batch {batch_size}",
}


def groups_of_setups(arguments: argparse.Namespace) -> list[list[Setup]]:
    """What to measure, in groups of networks that take turns."""
    fields = product(arguments.mode, arguments.dtype, arguments.size, arguments.batch_size)
    return [group_of_setups(arguments, *values) for values in fields]


def group_of_setups(
    arguments: argparse.Namespace, mode: str, dtype: str, image_size: tuple[int, int], batch_size: int
) -> list[Setup]:
    """The networks of one group, each compiled, checkpointed and prepared or not, as the arguments say."""
    shared: dict[str, Any] = {"mode": mode, "dtype": dtype, "image_size": image_size, "batch_size": batch_size}
    shared |= {"device": arguments.device, "channels_last": arguments.channels_last}
    checkpointing = YES_NO_BOTH[arguments.checkpointing] if mode == "training" else [False]
    setups = []
    for compiled, checkpointed, network in product(YES_NO_BOTH[arguments.compile], checkpointing, arguments.networks):
        can_prepare = network in PRESETS and mode == "inference"
        for prepared in YES_NO_BOTH[arguments.prepare] if can_prepare else [False]:
            how: dict[str, Any] = {"compiled": compiled, "checkpointing": checkpointed, "prepared": prepared}
            setups.append(Setup(network=network, **shared, **how))
    return setups


def memory_in_own_process(setup: Setup) -> dict[str, Any]:
    """The figures of [`measure_memory`], or the `memory_error` with which its process ended."""
    options = json.dumps({**asdict(setup), "threads": torch.get_num_threads()})
    done = subprocess.run(
        [sys.executable, "-m", "vitae_hf", "benchmark", "--one", options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last_words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"memory_error": last_words[0]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(options: dict[str, Any]) -> dict[str, Any]:
    """What the process does that [`memory_in_own_process`] starts."""
    torch.set_num_threads(options.pop("threads"))
    return measure_memory(Setup(**{**options, "image_size": tuple(options["image_size"])}))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("reference", "rounds", "seconds", "threads", "channels_last")
    record: dict[str, Any] = {"settings": {name: getattr(arguments, name) for name in names}, "results": []}
    for setups in groups_of_setups(arguments):
        try:
            results = measure_speed(setups, arguments.reference, arguments.rounds, arguments.seconds)
        except Exception as error:  # one that all networks share, such as a dtype that the device cannot multiply
            results = [{**asdict(setup), "error": error_in_a_line(error)} for setup in setups]
        gc.collect()
        torch.cuda.empty_cache()  # so that the processes that measure memory have all of it
        for setup, result in zip(setups, results):
            if not arguments.skip_memory and "error" not in result:
                result.update(memory_in_own_process(setup))
        record["results"] += results
        record.update(environment(arguments.device))
        print(table(results), flush=True)
        if arguments.output is not None:
            write(record, arguments.output)
    return record


def write(record: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, output.with_suffix(".json"))
    write_text(table(record["results"]), output.with_suffix(".md"))
    if measured := [result for result in record["results"] if "error" not in result]:
        draw(measured, f"{record['device']}, {record['threads']} thread(s)", output.with_suffix(".png"))


def ways_of(result: dict[str, Any]) -> list[str]:
    """How a network ran, in words; none if it ran as loaded."""
    ways = {"prepared": "prepared", "merged": "groups merged", "compiled": "compiled", "checkpointing": "checkpointed"}
    return [way for name, way in ways.items() if result.get(name)]


def name_of(result: dict[str, Any]) -> str:
    return ", ".join([result["network"], *ways_of(result)])


def table(results: list[dict[str, Any]]) -> str:
    """A table in Markdown with a row for each result, and below it a list of the networks that failed."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "network": name_of,
        "mode": lambda row: row["mode"],
        "dtype": lambda row: row["dtype"],
        "size": lambda row: GROUPED_BY["image_size"](row["image_size"]),
        "batch": lambda row: str(row["batch_size"]),
        "GMACs": lambda row: f"{row['gmacs']:.3f}",
        "images/s": lambda row: f"{row['images_per_s']:.3g}",
        "relative efficiency": lambda row: with_spread(row["relative_efficiency"], 1),
        "% of peak": lambda row: with_spread(row["fraction_of_peak"], 100),
        "peak MiB": lambda row: f"{row['peak_mib']:.0f}" if "peak_mib" in row else "–",
        "above idle": lambda row: f"{row['peak_mib'] - row['idle_peak_mib']:.0f}" if "peak_mib" in row else "–",
        "saved MiB/image": lambda row: f"{row['saved_mib_per_image']:.1f}" if "saved_mib_per_image" in row else "–",
    }
    lines = ["| " + " | ".join(columns) + " |", "|---" * 4 + "|---:" * (len(columns) - 4) + "|"]
    for row in results:
        if "error" not in row:
            lines.append("| " + " | ".join(text(row) for text in columns.values()) + " |")
    errors = [
        f"- {name_of(row)}, {', '.join(text(row[name]) for name, text in GROUPED_BY.items())}: {row[kind]}"
        for row in results
        for kind in ("error", "memory_error")
        if kind in row
    ]
    return "\n".join([*lines, *([""] if errors else []), *errors]) + "\n"


def with_spread(ratio: dict[str, Any] | None, factor: float) -> str:
    if ratio is None:
        return "–"
    median, lowest, highest = (factor * ratio[key] for key in ("median", "lowest", "highest"))
    return f"{median:.3g} ({lowest:.3g}–{highest:.3g})"


def tokens(row: dict[str, Any]) -> float:
    """How many patches of 16×16 pixels an image has."""
    return row["image_size"][0] * row["image_size"][1] / 256


Value = Callable[[dict[str, Any]], Any]
"""Of a result a number, or the median, lowest and highest of the rounds; none if it is not known."""
# What is drawn, by its title.
PANELS: dict[str, Value] = {
    "time per image (ms)": lambda row: 1000 / row["images_per_s"],
    "time per 16×16 pixels (µs)": lambda row: 1e6 / row["images_per_s"] / tokens(row),
    "peak memory above idle (MiB)": lambda row: row["peak_mib"] - row["idle_peak_mib"] if "peak_mib" in row else None,
    "relative efficiency": lambda row: row["relative_efficiency"],
    "fraction of the matrix product's peak": lambda row: row["fraction_of_peak"],
}
# If values differ by more than a factor of ten.
LOGARITHMIC: tuple[str, ...] = ("time per image (ms)", "peak memory above idle (MiB)")


def draw(results: list[dict[str, Any]], where: str, path: Path) -> None:
    """Draw curves over image size or batch size, whichever has three or more values, and bars if neither has."""
    values = {name: list(dict.fromkeys(text(row[name]) for row in results)) for name, text in GROUPED_BY.items()}
    over = next((name for name in ("image_size", "batch_size") if len(values[name]) > 2), None)
    varying = [name for name in GROUPED_BY if len(values[name]) > 1 and name != over]
    titles = [title for title, value in PANELS.items() if any(value(row) for row in results)]
    titles = titles[:4] if over else [title for title in titles if "16×16" not in title]
    figure = Figure(figsize=(13, 4.4 * ((len(titles) + 1) // 2)), layout="constrained")
    figure.suptitle(", ".join([*(values[name][0] for name in GROUPED_BY if len(values[name]) == 1), where]))
    axes = figure.subplots((len(titles) + 1) // 2, 2, squeeze=False).flat
    for axis, title in zip(axes, titles):
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="both" if over else "y")
        if over:
            draw_curves(axis, results, PANELS[title], varying, over)
        else:
            draw_bars(axis, results, PANELS[title], varying)
    for axis in list(axes)[len(titles) :]:
        axis.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def points(rows: list[dict[str, Any]], value: Value) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the lowest and the highest round lie from them; not a number where nothing is known."""
    values = [value(row) or float("nan") for row in rows]
    names = ("median", "lowest", "highest")
    found = [item if isinstance(item, dict) else dict.fromkeys(names, item) for item in values]
    below = [item["median"] - item["lowest"] for item in found]
    above = [item["highest"] - item["median"] for item in found]
    return [item["median"] for item in found], [below, above]


def plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def choose_scale(axis: Axes, medians: list[float]) -> None:
    known = [median for median in medians if median > 0]
    if axis.get_title() in LOGARITHMIC and max(known) > 10 * min(known):
        axis.set(yscale="log", ylim=(0.7 * min(known), 1.5 * max(known)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: plain(value))
    else:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])


def draw_bars(axis: Axes, results: list[dict[str, Any]], value: Value, varying: list[str]) -> None:
    """Draw a group of bars for each combination of the varying fields, in which each network has its colour."""
    group_of = {id(row): "\n".join(GROUPED_BY[name](row[name]) for name in varying) for row in results}
    groups, networks = list(dict.fromkeys(group_of.values())), list(dict.fromkeys(map(name_of, results)))
    width = 0.8 / len(networks)
    for idx, network in enumerate(networks):
        rows = [row for row in results if name_of(row) == network]
        places = [groups.index(group_of[id(row)]) + (idx - (len(networks) - 1) / 2) * width for row in rows]
        medians, errors = points(rows, value)
        bars = axis.bar(places, medians, width, yerr=errors, label=network, capsize=2, error_kw={"alpha": 0.5})
        axis.bar_label(bars, labels=list(map(plain, medians)), fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), groups)
    choose_scale(axis, points(results, value)[0])


def draw_curves(axis: Axes, results: list[dict[str, Any]], value: Value, varying: list[str], over: str) -> None:
    """Draw a curve over the field `over` for each network (by colour) and combination of varying fields (by line)."""
    number: Value = {"image_size": tokens, "batch_size": lambda row: row["batch_size"]}[over]
    curves: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(results, key=number):
        curves.setdefault((name_of(row), *(GROUPED_BY[name](row[name]) for name in varying)), []).append(row)
    networks, kinds = (list(dict.fromkeys(part)) for part in ((key[0] for key in curves), (key[1:] for key in curves)))
    for (network, *kind), rows in curves.items():
        style: dict[str, Any] = {
            "color": f"C{networks.index(network)}",
            "linestyle": ["-", "--", ":", "-."][kinds.index(tuple(kind)) % 4],
        }
        label = ", ".join([network, *kind])
        axis.errorbar([number(row) for row in rows], *points(rows, value), label=label, marker="o", capsize=3, **style)
    choose_scale(axis, points(results, value)[0])
    ticks = {number(row): GROUPED_BY[over](row[over]) for row in results}
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae benchmark", __doc__)
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["vitae-t", "vitae-s", "vitaev2-s", "vit-s", "swin-t"],
        help=f"{', '.join([*PRESETS, *OTHER_NETWORKS])}, or timm:NAME; default: vitae-t vitae-s vitaev2-s vit-s swin-t",
    )
    parser.add_argument(
        "--reference", default="vit-s", help="network that the others are compared with; default: vit-s"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", action="append", help="side, or height and width; repeatable; default: 224"
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8], help="default: 8")
    parser.add_argument(
        "--mode", nargs="+", choices=["inference", "training"], default=["inference"], help="default: inference"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=["float32"], help="default: float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", choices=list(YES_NO_BOTH), default="no", help="use torch.compile")
    parser.add_argument("--prepare", choices=list(YES_NO_BOTH), default="no", help="use prepare_for_inference")
    parser.add_argument(
        "--checkpointing",
        choices=list(YES_NO_BOTH),
        default="no",
        help="recompute activations in the backward pass, in training",
    )
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long a network runs in each round, at least")
    parser.add_argument("--skip_memory", action="store_true", help="do not measure memory, which takes a process each")
    parser.add_argument("--output", type=Path, help="files to write; a suffix is replaced by .json, .md and .png")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.networks = list(dict.fromkeys([*arguments.networks, arguments.reference]))
    if unknown := [network for network in arguments.networks if not is_known(network)]:
        parser.error(f"unknown networks {unknown}; there are {[*PRESETS, *OTHER_NETWORKS]} and timm:NAME")
    counts = {"threads": [arguments.threads], "rounds": [arguments.rounds], "batch_size": arguments.batch_size}
    for name, values in counts.items():
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    if any(len(size) > 2 for size in arguments.size or []):
        parser.error("--size takes a side, or height and width; give it again for another size")
    arguments.size = [(size[0], size[-1]) for size in arguments.size or [(224,)]]
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    if arguments.one is not None:
        return measure_one(arguments.one)
    torch.set_num_threads(arguments.threads)
    return measure(arguments)
