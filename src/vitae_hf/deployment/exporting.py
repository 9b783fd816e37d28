# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model as a program that runs elsewhere: ONNX, `torch.export` or OpenVINO, in float32 or int8.

Through the library's own exporters (`transformers.exporters`). Batch, height and width stay open in every format; what
each of them makes of sizes that do not fit is in [`export_model`].
"""

import copy
import importlib.util
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..files import find_model
from ..hub.conversion import whole_folder
from ..loading import check_source, load_trained
from .inference import fold_batch_norms


# The library's name of each format, and the packages it takes.
BACKENDS = {"onnx": "onnx", "torch": "dynamo", "openvino": "openvino"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "openvino": ("openvino",)}
MANIFEST = "export.json"  # which the library writes beside a program
TOLERANCE = 1e-4
"""Largest difference of an output from the model's, in standard deviations of the output; measured: below 1e-5."""
INT8_TOLERANCE = 0.2
"""The same of int8 programs, but root mean square; measured: below 0.05."""


def check_format(name: str) -> None:
    """See that a format is known and can be written here.

    Raises:
        ValueError: there is no such format.
        ImportError: it takes packages that are not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"the format must be one of {', '.join(BACKENDS)}; got {name!r}")
    if importlib.util.find_spec("transformers.exporters.runners") is None:
        raise ImportError(f"exporting takes transformers 5.23 or newer, this is {transformers.__version__}")
    if missing := [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]:
        raise ImportError(
            f"the format {name} takes {', '.join(missing)}, not installed here: `pip install 'vitae-hf[export]'`"
        )


def load_for_export(source: str | Path):
    """A classifier, or else the network without a head, in float32, and its image processor.

    Raises:
        OSError, ValueError: see [`load_trained`]; or it is another network.
    """
    check_source(find_model(source))
    config = AutoConfig.from_pretrained(find_model(source))
    architecture = (config.architectures or [""])[0]
    if not config.model_type.startswith("vitae") or architecture.endswith("Backbone"):
        raise ValueError(
            f"{source} holds {architecture or config.model_type}: only classifiers and headless models of ViTAE and"
            " ViTAEv2 are exported"
        )
    return load_trained(source, headless=True)


@contextmanager
def whole_strides(model: PreTrainedModel):
    """Calls take of an image what is whole strides, and a tracer knows its sides to be stride · (side // stride).

    All sizes in the network are then sums of whole terms. From sides that are bare symbols every convolution makes
    another quotient, and comparing these took minutes in ViTAEv2, where windows multiply them.
    """
    stride = model.config.total_stride

    def trim(module, args, inputs):
        pixel_values = inputs["pixel_values"]
        height, width = (side // stride * stride for side in pixel_values.shape[-2:])
        return args, {**inputs, "pixel_values": pixel_values[..., :height, :width]}

    handle = model.register_forward_pre_hook(trim, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def forward_inputs(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, Any]:
    """How any size of image is passed: variants with positions interpolate them."""
    inputs = {"pixel_values": pixel_values}
    return inputs | {"interpolate_pos_encoding": True} if model.config.has_class_token else inputs


def export_model(model: PreTrainedModel, format: str, quantizer=None):
    """Trace a model for images of any number and size.

    Its BatchNorms are folded in a copy; positions of the class-token variants are interpolated to the size of the
    image. Batch, height and width stay open, sides being multiples of `config.total_stride`. Of other sides,
    `"torch"` and `"onnx"` programs raise an error, `"openvino"` leaves the rest on the right and at the bottom out. A
    `"torch"` program also wants sides of two strides at least, and stays on the device of the model.

    Args:
        model: a classifier or headless model of this family.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        quantizer: one of `transformers.exporters` that goes with the format; default: float32.

    Returns:
        The library's `ExportedModel`: can be called like the model, saved, loaded.

    Raises:
        ValueError, ImportError: see [`check_format`].
    """
    check_format(format)
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

    model = copy.deepcopy(model)
    fold_batch_norms(model)
    stride, (height, width) = model.config.total_stride, model.config.image_height_width
    example = torch.zeros(2, model.config.num_channels, height + stride, width + 2 * stride)
    inputs = forward_inputs(model, example.to(model.device))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {**dict.fromkeys(inputs), "pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}}
    settings = {"export_format": BACKENDS[format], "dynamic_shapes": shapes, "quantizer": quantizer}
    config = AutoExportConfig.from_dict(settings)
    with whole_strides(model):
        exported = AutoHfExporter.from_config(config).export(model, inputs, config)
    if format == "onnx":
        refuse_remainders(exported.program)
        for node in exported.program.graph:
            node.metadata_props.clear()  # where in our code it is from, with this machine's paths
    exported.config = None  # it stays with the model: beside a program it would make loading ask for our code
    return exported


def refuse_remainders(program) -> None:
    """Give an ONNX graph the image as it is, in the place of what [`whole_strides`] took of it, and in that shape.

    ONNX Runtime then refuses what has more pixels, where it would go on with a part of the image.
    """
    import onnx_ir

    graph = program.graph
    image, trimmed = graph.inputs[0], graph.inputs[0]
    while slices := [use.node for use in trimmed.uses() if use.node.op_type == "Slice" and use.idx == 0]:
        trimmed = slices[0].outputs[0]
    shape = onnx_ir.node("Shape", [trimmed])
    whole = onnx_ir.node("Reshape", [image, shape.outputs[0]])
    whole.outputs[0].shape, whole.outputs[0].type = trimmed.shape, trimmed.type
    trimmed.replace_all_uses_with(whole.outputs[0])
    shape.replace_input_with(0, trimmed)
    graph.insert_after(trimmed.producer(), [shape, whole])
    image.shape = onnx_ir.Shape(["batch", image.shape[1], "height", "width"])


def int8_quantizer():
    """int8 weights for the matrix products, whose inputs become int8 as they come: no calibration. For `"onnx"`.

    Their range is taken over the whole batch, so that an image's scores depend a little on its company. Convolutions
    stay in float32: in int8 they were slower, the grouped ones by far, and less exact (results/LOG.md).
    """
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    matrix_products = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}
    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, **matrix_products))


def load_exported(folder: str | Path, **options):
    """A saved program, ready to be called like the model it came from.

    Args:
        options: of the library's runner for the format: `session_options` of ONNX Runtime, `config` of OpenVINO. The
            latter computes in float32 unless this says otherwise; by itself it takes bfloat16 where processors have it.

    Raises:
        OSError: there is no program in this folder.
    """
    from transformers.exporters import ExportedModel

    manifest = json.loads((Path(folder) / MANIFEST).read_text())
    if manifest["export_format"] == "openvino":
        options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}, **options}
    return ExportedModel.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def compare(exported, model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, float]:
    """How far a program is from the model on some images.

    Returns:
        Largest and root mean square difference, each over the standard deviation of the model's output, of the worst
        output; and for classifiers the share of images, in percent, for which both name the same class.
    """
    inputs = forward_inputs(model, pixel_values)
    expected, outputs = model(**inputs), exported(**inputs)
    differences = [(outputs[name].float() - value) / value.std() for name, value in expected.items()]
    figures = {
        "max_over_std": max(difference.abs().max().item() for difference in differences),
        "rms_over_std": max(difference.square().mean().sqrt().item() for difference in differences),
    }
    if "logits" in expected:
        same = outputs["logits"].argmax(-1) == expected["logits"].argmax(-1)
        figures["same_top1_percent"] = 100 * same.float().mean().item()
    return figures


def read_batch(processor, pictures: list, batch: int, height: int, width: int) -> torch.Tensor:
    """Some pictures, again from the first where there are too few: `(batch, C, height, width)`."""
    chosen = [pictures[index % len(pictures)] for index in range(batch)]
    return processor(chosen, size={"height": height, "width": width}, return_tensors="pt").pixel_values


def verify(exported, model: PreTrainedModel, processor, pictures: list, int8: bool = False) -> list[dict]:
    """Compare a program with the model on real pictures, of the model's size and not square, one and several.

    Raises:
        ValueError: they differ by more than [`TOLERANCE`], or root mean square by more than [`INT8_TOLERANCE`].
    """
    stride, (height, width) = model.config.total_stride, model.config.image_height_width
    sizes = ((1, height, width), (3, height, width), (1, height + 2 * stride, width), (2, height, width + 3 * stride))
    name, limit = ("rms_over_std", INT8_TOLERANCE) if int8 else ("max_over_std", TOLERANCE)
    checks = []
    for batch, rows, columns in sizes:
        figures = compare(exported, model, read_batch(processor, pictures, batch, rows, columns))
        checks.append({"batch": batch, "height": rows, "width": columns, **figures})
        if not figures[name] <= limit:  # not a number is no agreement either
            raise ValueError(
                f"the exported program disagrees with the model by {figures[name]:.2g} ({name}) on {batch} pictures of"
                f" {rows}×{columns} pixels, at most {limit} was expected"
            )
    return checks


@contextmanager
def replaced_folder(output: Path):
    """[`whole_folder`], in the place of an earlier export, which stays if anything fails.

    Raises:
        FileExistsError: something else is there.
    """
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise FileExistsError(f"{output} exists already and is no export: choose another --output")
    with whole_folder(output) as unfinished:
        yield unfinished
        shutil.rmtree(output, ignore_errors=True)


def export_folder(
    source: str | Path, format: str, pictures: list, output: str | Path | None = None, int8: bool = False
) -> dict:
    """Write a folder's or repository's model as a program that was compared with it, or nothing at all.

    Args:
        source: of a classifier or headless model of this family; it stays as it is.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        pictures: to compare on: paths, or what else its image processor takes.
        output: folder to write; default: `source/onnx` (or another format; int8: `source/onnx_int8`).
        int8: quantize, see [`int8_quantizer`].

    Returns:
        Folder, format, size in bytes, seconds, and the comparison.

    Raises:
        ValueError: of [`check_format`], [`load_for_export`] and [`verify`]; a picture cannot be read; there is no
            output, or no int8 in this format.
        OSError: something cannot be read or written.
        ImportError: a package is missing.
    """
    check_format(format)
    if int8 and format != "onnx":
        raise ValueError(f"int8 goes with the format onnx, not with {format}")
    if output is None and not Path(source).is_dir():
        raise ValueError(f"{source} is no folder here; for a name on the Hub, say where to write with --output")
    output = Path(output or Path(source, f"{format}_int8" if int8 else format)).resolve()
    started = time.perf_counter()
    with replaced_folder(output) as unfinished:
        model, processor = load_for_export(source)
        export_model(model, format, int8_quantizer() if int8 else None).save_pretrained(unfinished)
        checks = verify(load_exported(unfinished), model, processor, pictures, int8)
        size = sum(path.stat().st_size for path in unfinished.iterdir())
    return {
        "output": str(output),
        "format": format,
        "dtype": "int8" if int8 else "float32",
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 1),
        "checks": checks,
    }
