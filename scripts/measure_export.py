# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How large, how fast and how faithful are exported programs, beside the torch model, in float32, bfloat16 and int8?

    python scripts/measure_export.py --demo outputs/vitae-nano-fashion --photographs FOLDER --output results/export_cpu.json

`--demo` is what `make demo` trained, compared on the 1,000 test images of the example data; the other networks have the
golden weights of the tests, compared on photographs, one by one. In bfloat16 OpenVINO runs the same file. Programs and
models take turns, on as many threads as torch has.
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from measure_parity import golden_state_dict
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessorPil, config_from_preset, convert_original_state_dict, prepare_for_inference
from vitae_hf.benchmarking import interleave
from vitae_hf.data import load_images, load_labelled_images
from vitae_hf.environment import environment
from vitae_hf.exporting import export_folder, forward_inputs, load_exported, load_for_export
from vitae_hf.samples import decode


EXAMPLES = Path(__file__).parents[1] / "examples"


def write_golden(preset: str, folder: Path) -> Path:
    """A folder of a published variant with the weights of the golden data."""
    model = AutoModelForImageClassification.from_config(config_from_preset(preset))
    model.load_state_dict(convert_original_state_dict(golden_state_dict(preset)))
    model.save_pretrained(folder)
    ViTAEImageProcessorPil(size=model.config.image_size).save_pretrained(folder)
    return folder


def export_all(source: Path, root: Path) -> dict[str, dict]:
    """The records of all programs, by the name that they have here."""
    pictures = [str(EXAMPLES / name) for name in ("chelsea.png", "sneaker.png")]
    wanted = {"onnx": ("onnx", False), "onnx_int8": ("onnx", True), "openvino": ("openvino", False)}
    return {name: export_folder(source, *_, pictures) for name, _ in ()} | {
        name: export_folder(source, format, pictures, root / name, int8) for name, (format, int8) in wanted.items()
    }


def load_all(source: Path, records: dict[str, dict]) -> dict:
    """Everything that can be called, float32 torch first."""
    threads = torch.get_num_threads()
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads cost the others
    model = load_for_export(source)
    runs = {
        "torch_float32": prepare_for_inference(copy.deepcopy(model)),
        "torch_bfloat16": prepare_for_inference(model, dtype=torch.bfloat16),
    }
    for name in ("onnx", "onnx_int8"):
        runs[name] = load_exported(records[name]["output"], session_options=session_options)
    for name, precision in (("openvino_float32", "f32"), ("openvino_bfloat16", "bf16")):
        config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        runs[name] = load_exported(records["openvino"]["output"], config=config)
    return runs


@torch.no_grad()
def logits(run, config, batches: list[torch.Tensor]) -> np.ndarray:
    dtype = run.dtype
    outputs = [run(**_inputs(config, batch.to(dtype))).logits.float().numpy() for batch in batches]
    return np.concatenate(outputs)
