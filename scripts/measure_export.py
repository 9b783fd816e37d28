# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How large, how fast and how faithful are exported programs, beside the torch model, in float32, bfloat16 and int8?

    python scripts/measure_export.py --demo outputs/vitae-nano-fashion --photographs FOLDER --output FILE.json

`--demo` is the model that `make demo` trained. It is compared on the 1,000 test images of the example data. The other
networks have the golden weights of the tests and are compared on photographs, one by one. For bfloat16, OpenVINO runs
its float32 file. Programs and models take turns, on as many threads as torch has.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_parity import golden_state_dict
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessorPil, config_from_preset, convert_original_state_dict, prepare_for_inference
from vitae_hf.data.pictures import decode
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.deployment.benchmarking import interleave
from vitae_hf.deployment.exporting import export_folder, forward_inputs, load_exported, load_for_export
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import PICTURES, output_file, write_json


EXAMPLES = Path(__file__).parents[1] / "examples"


def write_golden(preset: str, folder: Path) -> Path:
    """Write a published variant with the weights of the golden data, and return its folder."""
    model = AutoModelForImageClassification.from_config(config_from_preset(preset))
    model.load_state_dict(convert_original_state_dict(golden_state_dict(preset)))
    model.save_pretrained(folder)
    ViTAEImageProcessorPil(size=model.config.image_size).save_pretrained(folder)
    return folder


def export_all(source: Path, root: Path) -> dict[str, dict]:
    """Write every program in `root`, and return their records by name."""
    pictures = list(map(str, PICTURES))
    return {
        "onnx": export_folder(source, "onnx", pictures, root / "onnx"),
        "onnx_int8": export_folder(source, "onnx", pictures, root / "onnx_int8", int8=True),
        "openvino": export_folder(source, "openvino", pictures, root / "openvino"),
    }


def session_options() -> Any:
    """Of ONNX Runtime, for as many threads as torch has."""
    import onnxruntime  # here, so that `measure_formats.py` runs without

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Waiting threads would slow down the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_all(source: Path, records: dict[str, dict]) -> dict:
    """Load all programs, and the torch model in float32 and bfloat16; float32 is the first."""
    model, _ = load_for_export(source)
    runs = {
        "torch_float32": prepare_for_inference(copy.deepcopy(model)),
        "torch_bfloat16": prepare_for_inference(model, dtype=torch.bfloat16),
    }
    for name in ("onnx", "onnx_int8"):
        runs[name] = load_exported(records[name]["output"], session_options=session_options())
    for name, precision in (("openvino_float32", "f32"), ("openvino_bfloat16", "bf16")):
        config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        runs[name] = load_exported(records["openvino"]["output"], config=config)
    return runs


def predictor(run, model) -> Callable[[torch.Tensor], np.ndarray]:
    """A function from images to logits. Torch models get images in their own dtype, channels last."""
    is_torch = isinstance(run, torch.nn.Module)

    @torch.inference_mode()
    def predict(pixel_values: torch.Tensor) -> np.ndarray:
        if is_torch:
            pixel_values = pixel_values.to(run.dtype, memory_format=torch.channels_last)
        return run(**forward_inputs(model, pixel_values)).logits.float().numpy()

    return predict


def agreement(found: np.ndarray, expected: np.ndarray, labels: list[int] | None) -> dict:
    """Compare logits `(images, classes)`: how far they differ, and how often they name the same or the right class."""
    classes = found.argmax(1)
    figures = {
        "same_top1_percent": 100 * float((classes == expected.argmax(1)).mean()),
        "rms_over_std": float(np.sqrt(((found - expected) ** 2).mean()) / expected.std()),
    }
    if labels is not None:
        figures["top1_percent"] = 100 * float((classes == np.array(labels)).mean())
    return figures


def measure(source: Path, pictures: list, labels: list[int] | None, rounds: int) -> dict:
    """Measure the size of each program, its time for one image, and its agreement with torch on all pictures."""
    with tempfile.TemporaryDirectory() as root:
        records = export_all(source, Path(root))
        runs = load_all(source, records)
        predictors = {name: predictor(run, runs["torch_float32"]) for name, run in runs.items()}
        processor = AutoImageProcessor.from_pretrained(source)
        images = [processor(picture, return_tensors="pt").pixel_values for picture in pictures]
        seconds, errors = interleave(
            {name: partial(predict, images[0]) for name, predict in predictors.items()}, rounds, 0.5, "cpu"
        )
        if errors:
            raise RuntimeError(f"some programs do not run: {errors}")
        found = {name: np.concatenate([predict(image) for image in images]) for name, predict in predictors.items()}
    sizes = {name: record["bytes"] for name, record in records.items()}
    return {
        "images": len(images),
        "image_size": list(images[0].shape[-2:]),
        "export_seconds": {name: record["seconds"] for name, record in records.items()},
        "checks": {name: record["checks"] for name, record in records.items()},
        "programs": {
            name: {
                "bytes": sizes.get(name, sizes["openvino"] if "openvino" in name else None),
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "milliseconds_rounds": [1e3 * value for value in seconds[name]],
                **agreement(found[name], found["torch_float32"], labels),
            }
            for name in runs
        },
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that make demo wrote; default: leave it out")
    parser.add_argument("--photographs", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--presets", nargs="*", default=["vitae-t", "vitae-s", "vitaev2-s"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    networks = {}
    if arguments.demo is not None:
        test = load_labelled_images(str(EXAMPLES / "fashion_mnist_mini"))["test"]
        networks["vitae-nano"] = measure(arguments.demo, list(map(decode, test)), test["label"][:], arguments.rounds)
    photographs = sorted(str(path) for path in arguments.photographs.iterdir())
    if not photographs:
        raise ValueError(f"{arguments.photographs} is empty: --photographs is a folder of pictures")
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            networks[preset] = measure(write_golden(preset, Path(folder)), photographs, None, arguments.rounds)
    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino")}
    record = {"networks": networks, **versions, **environment()}
    if arguments.output:
        write_json(record, arguments.output)
    return record


if __name__ == "__main__":
    run_command(main)
