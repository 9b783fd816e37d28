# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which format is how large, how fast and how faithful, and what does it need where it runs?

    python scripts/measure_formats.py --photographs FOLDER --output results/formats_cpu

Measures every format of `vitae export`, and models that `from_pretrained` quantises, for `vitae-nano` as it ships and
for `vitae-t` and `vitaev2-s` with the golden weights of the tests. Each row is measured in a process of its own, where
the program takes turns with the prepared torch model, and written to the output at once. A row that cannot be measured
says why. A format whose packages are in another environment is measured there: `--python litert=VENV/bin/python`.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_export import predictor, session_options, write_golden
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, TorchAoConfig

from vitae_hf import prepare_for_inference
from vitae_hf.deployment.benchmarking import interleave
from vitae_hf.deployment.exporting import BACKENDS, export_folder, load_exported, load_for_export, read_batch
from vitae_hf.environment import environment
from vitae_hf.failures import of_a_missing_package, plain_words, run_command
from vitae_hf.files import ASSETS, PICTURES, write_json, write_text


NEEDS: dict[str, tuple[str, ...]] = {
    "torch_float32": ("transformers", "torch"),
    "torch_bfloat16": ("transformers", "torch"),
    "onnx": ("onnxruntime",),
    "onnx_int8": ("onnxruntime",),
    "torch": ("transformers", "torch"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("ai-edge-litert",),
    "coreml": (),
    "torch-aoti": ("torch",),
    "torchao_int8": ("transformers", "torch", "torchao"),
    "torchao_int8_dynamic": ("transformers", "torch", "torchao"),
    "bitsandbytes_int8": ("transformers", "torch", "bitsandbytes", "accelerate"),
}
"""Each row, and the packages that it needs where it runs. The first two are the model itself, prepared."""


def thread_options(format: str, threads: int) -> dict[str, Any]:
    """The options of `load_exported` for a number of threads; those of torch follow torch."""
    if format == "onnx":
        return {"session_options": session_options()}
    if format == "executorch":
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(threads)
    if format == "openvino":
        return {"config": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}}
    return {"threads": threads} if format == "litert" else {}


def quantization(name: str) -> Any:
    """What `from_pretrained` takes for a quantised row."""
    if name == "bitsandbytes_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if name == "torchao_int8" else Int8DynamicActivationInt8WeightConfig())


def build(name: str, source: Path, folder: Path, threads: int) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """Make and load what a row measures. Returns it, unless it cannot run here, and the figures known so far."""
    if name in ("torch_float32", "torch_bfloat16"):
        model, _ = load_for_export(source)
        model = prepare_for_inference(model, dtype=getattr(torch, name.removeprefix("torch_")))
        return model, {"bytes": sum(value.nbytes for value in model.state_dict().values())}
    format = name.removesuffix("_int8")
    if format in BACKENDS:
        record = export_folder(source, format, list(map(str, PICTURES)), folder / name, name != format)
        figures = {"bytes": record["bytes"], "export_seconds": record["seconds"]}
        if reason := record.get("not_compared"):
            return None, {**figures, "error": reason}
        return load_exported(folder / name, **thread_options(format, threads)), figures
    model = AutoModelForImageClassification.from_pretrained(source, quantization_config=quantization(name)).eval()
    model.save_pretrained(folder / name)
    return model, {"bytes": (folder / name / "model.safetensors").stat().st_size}


def measure_row(name: str, source: Path, photographs: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measure size, time of an image, and distance from the float32 model over all pictures, one by one."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run, figures = build(name, source, Path(folder), threads)
        if run is None:
            return figures
        model, processor = load_for_export(source)
        size = model.config.image_height_width
        images = [read_batch(processor, [path], 1, *size) for path in photographs]
        predict, expect = predictor(run, model), predictor(model, model)
        reference = predictor(prepare_for_inference(copy.deepcopy(model)), model)
        turns = {"row": partial(predict, images[0]), "reference": partial(reference, images[0])}
        seconds, errors = interleave(turns, rounds, 0.5, "cpu")
        if errors:
            return {**figures, "error": errors.get("row") or errors["reference"]}
        found, expected = (np.concatenate([function(image) for image in images]) for function in (predict, expect))
    return {
        **figures,
        "milliseconds": 1e3 * statistics.median(seconds["row"]),
        "milliseconds_rounds": [1e3 * value for value in seconds["row"]],
        "reference_milliseconds": 1e3 * statistics.median(seconds["reference"]),
        "max_over_std": float(np.abs(found - expected).max() / expected.std()),
        "rms_over_std": float(np.sqrt(((found - expected) ** 2).mean()) / expected.std()),
        "same_top1_percent": 100 * float((found.argmax(1) == expected.argmax(1)).mean()),
        "needs": {package: metadata.version(package) for package in NEEDS[name]},
    }


def row_in_a_process(python: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """[`measure_row`] in a process of its own, or an error that says why there is no row, also of one that crashed."""
    command = [python, __file__, *arguments]
    with tempfile.TemporaryDirectory() as caches:  # so that no row finds code that an earlier run compiled
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=variables)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} seconds"}
        except OSError as error:
            return {"error": str(error)}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"status {done.returncode}: {' '.join(done.stderr.splitlines()[-1:])}"[:500]}


def one_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the process of a row prints: its figures, or why there are none."""
    try:
        return measure_row(arguments.row, arguments.source, arguments.photographs, arguments.rounds, arguments.threads)
    except Exception as error:  # of any package: the row says so, and the others go on
        return {"error": of_a_missing_package(error, arguments.row) or plain_words(error)}


def table(record: dict[str, Any]) -> str:
    """The figures as a table in Markdown for each network."""
    lines = [f"Measured on {record['threads']} threads of {record['device']}, {record['date']}."]
    for network, rows in record["networks"].items():
        lines += ["", f"## {network}", "", "| | MB | ms | of the prepared model's | largest difference | needs |"]
        lines.append("|---|---|---|---|---|---|")
        for name, row in rows.items():
            size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
            if "error" in row:
                lines.append(f"| {name} | {size} | | | | {row['error']} |")
                continue
            share = row["milliseconds"] / row["reference_milliseconds"]
            needs = ", ".join(f"{package} {version}" for package, version in row["needs"].items())
            lines.append(
                f"| {name} | {size} | {row['milliseconds']:.1f} | {share:.2f} | {row['max_over_std']:.1e} | {needs} |"
            )
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], output: Path) -> None:
    write_json(record, output.with_suffix(".json"))
    write_text(table(record), output.with_suffix(".md"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder of pictures; default: those of the package")
    parser.add_argument("--networks", nargs="+", default=["vitae-nano", "vitae-t", "vitaev2-s"])
    parser.add_argument("--formats", nargs="+", default=list(NEEDS), choices=list(NEEDS))
    parser.add_argument("--python", nargs="*", default=[], help="FORMAT=PATH: which Python measures a format")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a row")
    parser.add_argument("--output", type=Path, default=Path("results/formats_cpu"), help="without suffix")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # these two for the process of a row
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.photographs
    arguments.photographs = sorted(map(str, folder.iterdir() if folder else PICTURES))
    if not arguments.photographs:
        raise ValueError(f"{folder} is empty: --photographs is a folder of pictures")
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    if arguments.row:
        return one_row(arguments)
    torch.set_num_threads(arguments.threads)
    pythons = dict(word.split("=", 1) for word in arguments.python)
    given = sys.argv[1:] if argv is None else list(argv)
    record: dict[str, Any] = {"networks": {}, "pictures": len(arguments.photographs), **environment()}
    for network in arguments.networks:
        rows = record["networks"][network] = {}
        with tempfile.TemporaryDirectory() as folder:
            is_nano = network == "vitae-nano"
            source = ASSETS / "vitae-nano-fashion" if is_nano else write_golden(network, Path(folder))
            for name in arguments.formats:
                python = pythons.get(name, sys.executable)
                words = [*given, "--row", name, "--source", str(source)]
                rows[name] = row_in_a_process(python, words, arguments.timeout)
                write(record, arguments.output)
                print(network, name, rows[name].get("milliseconds", rows[name].get("error")), file=sys.stderr)
    return record


if __name__ == "__main__":
    run_command(main)
