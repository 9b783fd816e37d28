# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which network is most accurate for its time? Published accuracy over measured time per image, ours and others'.

    python scripts/measure_frontier.py --output results/frontier_cpu   # `make bench-frontier`

Every network runs in torch, ONNX Runtime and OpenVINO, one image and several at a time, in float32 and, but for ONNX
Runtime, in bfloat16. All take turns in one run on the same threads; the time is the median over the rounds. Networks of
this package are prepared in torch and exported by `vitae export`'s functions; the others are what transformers and timm
give, with channels last in torch, and what the library's or torch's exporter writes. All have random weights, on which
time does not depend.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import openvino
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from measure_export import session_options
from transformers import PreTrainedModel
from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

from vitae_hf import PRESETS, prepare_for_inference
from vitae_hf.deployment.benchmarking import build_network, count_work, error_in_a_line, interleave
from vitae_hf.deployment.exporting import export_model
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import output_file, write_json, write_text
from vitae_hf.hub.variants import IMAGENET_1K, VARIANTS


SIZE = (224, 224)
Run = Callable[[], object]


@dataclass(frozen=True)
class Other:
    """A network of others: its name, its accuracy on ImageNet-1k as printed, and where."""

    network: str
    top1: float
    source: str


OTHERS = [
    Other("resnet-50", 76.1, "torchvision, the recipe of He et al. 2016"),
    Other("deit-s", 79.8, "Touvron et al. 2021, table 5"),
    Other("swin-t", 81.3, "Liu et al. 2021, table 1"),
    Other("convnext-t", 82.1, "Liu et al. 2022, table 1"),
    Other("timm:efficientformer_l1", 79.2, "Li et al. 2022, table 1; distilled"),
    Other("timm:efficientformer_l3", 82.4, "Li et al. 2022, table 1; distilled"),
]
OURS = ("vitae-t", "vitae-6m", "vitae-13m-paper", "vitae-s", "vitaev2-s")
WAYS = {  # in the order of the picture's columns
    "torch, float32": ("torch", torch.float32),
    "torch, bfloat16": ("torch", torch.bfloat16),
    "ONNX Runtime, float32": ("onnx", torch.float32),
    "OpenVINO, float32": ("openvino", torch.float32),
    "OpenVINO, bfloat16": ("openvino", torch.bfloat16),
}
FOR_README = ("torch, float32", "torch, bfloat16", "OpenVINO, bfloat16")  # what the short picture shows


def accuracies() -> dict[str, tuple[float, str]]:
    """Top-1 accuracy in percent, at 224², and its source, by network."""
    ours = {name: (VARIANTS[name].printed[IMAGENET_1K].top1, VARIANTS[name].papers[-1].url) for name in OURS}
    return ours | {other.network: (other.top1, other.source) for other in OTHERS}


def write_onnx(network: str, path: Path) -> Path:
    """A program for any number of images: ours by `vitae export`'s function, others by the library's or torch's."""
    model = build_network(network, SIZE).eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    if network in PRESETS:
        program = export_model(model, "onnx").program
    elif isinstance(model, PreTrainedModel):
        settings = {"export_format": "onnx", "dynamic_shapes": {"pixel_values": batch}}
        config = AutoExportConfig.from_dict(settings)
        inputs = {"pixel_values": torch.zeros(2, 3, *SIZE)}
        program = AutoHfExporter.from_config(config).export(model, inputs, config).program
    else:
        torch.onnx.export(model, (torch.zeros(2, 3, *SIZE),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
        return path
    onnx_ir.save(program, path)
    return path


def in_torch(network: str, dtype: torch.dtype, batch_size: int) -> Run:
    model = build_network(network, SIZE).eval()
    if network in PRESETS:
        model = prepare_for_inference(model, dtype=dtype)
    else:
        model = model.to(dtype).to(memory_format=torch.channels_last)
    pixels = torch.randn(batch_size, 3, *SIZE).to(dtype, memory_format=torch.channels_last)
    return partial(torch.inference_mode()(model), pixels)


def in_onnx_runtime(path: Path, batch_size: int) -> Run:
    session = onnxruntime.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((batch_size, 3, *SIZE), np.float32)
    return partial(session.run, None, {session.get_inputs()[0].name: pixels})


def in_openvino(path: Path, dtype: torch.dtype, batch_size: int) -> Run:
    program = openvino.Core().read_model(path)
    program.reshape([batch_size, 3, *SIZE])
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(program, "CPU", config)
    pixels = np.random.default_rng(0).standard_normal((batch_size, 3, *SIZE), np.float32)
    return partial(compiled, pixels)


def load(network: str, way: str, path: Path, batch_size: int) -> Run:
    runtime, dtype = WAYS[way]
    if runtime == "torch":
        return in_torch(network, dtype, batch_size)
    return in_onnx_runtime(path, batch_size) if runtime == "onnx" else in_openvino(path, dtype, batch_size)


def measure(networks: list[str], batch_sizes: list[int], rounds: int, least_seconds: float) -> list[dict]:
    """Milliseconds of an image for each network, way of running it, and batch size; or the error that it gave."""
    rows, printed = [], accuracies()
    with tempfile.TemporaryDirectory() as folder:
        paths, broken = {}, {}
        for network in networks:
            try:
                paths[network] = write_onnx(network, Path(folder) / f"{network.replace(':', '-')}.onnx")
            except Exception as error:  # of an exporter: the network is still timed in torch
                broken[network] = error_in_a_line(error)
        for way, batch_size in product(WAYS, batch_sizes):
            runs, errors = {}, {} if WAYS[way][0] == "torch" else dict(broken)
            for network in networks:
                try:
                    if network not in errors:
                        runs[network] = load(network, way, paths.get(network, Path()), batch_size)
                except Exception as error:  # of a runtime: the others are still timed
                    errors[network] = error_in_a_line(error)
            seconds, failed = interleave(runs, rounds, least_seconds, "cpu")
            for network in networks:
                row = {"network": network, "way": way, "batch_size": batch_size, "top1": printed[network][0]}
                if network in seconds:
                    row["ms_per_image"] = 1000 * statistics.median(seconds[network]) / batch_size
                else:
                    row["error"] = (errors | failed)[network]
                rows.append(row)
    return rows


def draw(rows: list[dict], path: Path, ways: Sequence[str] = tuple(WAYS)) -> None:
    """Accuracy over time, a panel for each way and batch size. A line joins the networks that no other one beats."""
    batch_sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(4 * len(ways), 3.6 * len(batch_sizes)), layout="constrained")
    axes = figure.subplots(len(batch_sizes), len(ways), sharey=True, squeeze=False)
    for (i, batch_size), (j, way) in product(enumerate(batch_sizes), enumerate(ways)):
        axis, here = axes[i, j], [row for row in rows if (row["way"], row["batch_size"]) == (way, batch_size)]
        here = sorted((row for row in here if "error" not in row), key=lambda row: row["ms_per_image"])
        best, edge = 0.0, []
        for row in here:
            is_ours = row["network"] in PRESETS
            axis.plot(row["ms_per_image"], row["top1"], "o" if is_ours else "s", color="C3" if is_ours else "0.45")
            name = row["network"].removeprefix("timm:")
            beside, side = ((5, -2), "left") if is_ours or row is here[0] else ((-5, -2), "right")
            point = (row["ms_per_image"], row["top1"])
            axis.annotate(name, point, beside, textcoords="offset points", ha=side, fontsize=8)
            if row["top1"] > best:
                best, edge = row["top1"], [*edge, row]
        axis.plot(*zip(*((row["ms_per_image"], row["top1"]) for row in edge)), color="0.8", zorder=0)
        axis.set_xscale("log")
        axis.margins(x=0.45)  # room for names
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{way}, batch {batch_size}", fontsize=9)
        axis.set_xlabel("milliseconds per image")
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("top-1 on ImageNet-1k, printed (%)")
    figure.savefig(path, dpi=120)


def markdown(rows: list[dict]) -> str:
    """Milliseconds of an image, a row for each network and batch size."""
    found = {(row["network"], row["batch_size"], row["way"]): row.get("ms_per_image") for row in rows}
    lines = [f"| network | top-1 (%) | batch | {' | '.join(WAYS)} |", f"|---|{'---:|' * (len(WAYS) + 2)}"]
    for network, (top1, _) in accuracies().items():
        for batch_size in sorted({row["batch_size"] for row in rows if row["network"] == network}):
            times = [found[network, batch_size, way] for way in WAYS]
            cells = ["–" if time is None else f"{time:.3g}" for time in times]
            lines.append(f"| {network} | {top1} | {batch_size} | {' | '.join(cells)} |")
    errors = [
        f"- {row['network']}, {row['way']}, batch {row['batch_size']}: {row['error']}" for row in rows if "error" in row
    ]
    return "\n".join([*lines, *(["", *errors] if errors else [])]) + "\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(accuracies()), default=list(accuracies()))
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each network in each round, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=output_file, required=True, help="path of the files without their suffix")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.networks, arguments.batch_size, arguments.rounds, arguments.seconds)
    networks = {
        network: {"top1": top1, "source": source, "gmacs": count_work(network, SIZE)[1]}
        for network, (top1, source) in accuracies().items()
        if network in arguments.networks
    }
    record = {"networks": networks, "rows": rows, "rounds": arguments.rounds, **environment()}
    write_json(record, arguments.output.with_suffix(".json"))
    write_text(markdown(rows), arguments.output.with_suffix(".md"))
    draw(rows, arguments.output.with_suffix(".png"))
    largest = [row for row in rows if row["batch_size"] == max(arguments.batch_size)]
    draw(largest, arguments.output.with_name(f"{arguments.output.name}_short.png"), FOR_README)
    return record


if __name__ == "__main__":
    run_command(main)
