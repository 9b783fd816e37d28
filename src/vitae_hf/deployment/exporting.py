# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model written as a program for other runtimes: ONNX, `torch.export` or OpenVINO, in float32 or int8.

The programs are made by the exporters of transformers (`transformers.exporters`). They take any number of images of any
valid size. [`export_model`] says what each format does with images of other sizes.
"""

import copy
import functools
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, BaseImageProcessor, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..files import find_model, whole_folder
from ..loading import any_size_options, check_source, load_trained
from .folding import fold_batch_norms


BACKENDS = {"onnx": "onnx", "torch": "dynamo", "openvino": "openvino"}
"""Each format, and what the library calls it."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("openvino",),
}
"""Each format, and the packages that it needs."""
MANIFEST = "export.json"
"""The file that the library writes beside a program."""
TOLERANCE = 1e-4
"""How far an output may be from the model's at most, in standard deviations of the output. Measured: below 1e-5."""
INT8_TOLERANCE = 0.2
"""How far the outputs of an int8 program may be from the model's, root mean square, in the same unit. Measured: below
0.05."""


def check_format(name: str) -> None:
    """Raise an error unless a format is known and can be written here.

    Raises:
        ValueError: there is no such format.
        ImportError: packages that it needs are not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"the format must be one of {', '.join(BACKENDS)}; got {name!r}")
    if importlib.util.find_spec("transformers.exporters.runners") is None:
        raise ImportError(f"exporting takes transformers 5.23 or newer, this is {transformers.__version__}")
    if missing := [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]:
        raise ImportError(
            f"the format {name} takes {', '.join(missing)}, not installed here: `pip install 'vitae-hf[export]'`"
        )


def load_for_export(source: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a classifier or headless model in float32, with all its trained weights, and its image processor.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: see [`load_trained`], or it holds another kind of model.
    """
    check_source(find_model(source))
    config = AutoConfig.from_pretrained(find_model(source))
    architecture = (config.architectures or [""])[0]
    others = ("Backbone", "ForMaskedImageModeling", "ForPreTraining")
    if not config.model_type.startswith("vitae") or architecture.endswith(others):
        raise ValueError(
            f"{source} holds {architecture or config.model_type}: only classifiers and headless models of ViTAE and"
            " ViTAEv2 are exported"
        )
    return load_trained(source, headless=True)


@contextmanager
def whole_strides(model: PreTrainedModel) -> Iterator[None]:
    """In this block, the model crops its input to sides of stride · (side // stride) pixels.

    A tracer then knows that both sides are multiples of the stride, and writes every size in the network as a product.
    Otherwise each convolution makes a new quotient, and in ViTAEv2, whose windows multiply these, comparing them took
    minutes.
    """
    stride = model.config.total_stride

    def trim(module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pixel_values = inputs["pixel_values"]
        height, width = (side // stride * stride for side in pixel_values.shape[-2:])
        return args, {**inputs, "pixel_values": pixel_values[..., :height, :width]}

    handle = model.register_forward_pre_hook(trim, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def return_logits_only(model: PreTrainedModel) -> None:
    """Make a classifier return the library's `ImageClassifierOutput`, without the features that it also computes.

    A program says of which class its outputs are, and one of this package could not be loaded without it.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_logits(*args: Any, **kwargs: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=forward(*args, **kwargs).logits)

    model.forward = forward_logits


def forward_inputs(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, Any]:
    """The arguments of `forward` for images of any size: the plain variants must interpolate their positions."""
    return {"pixel_values": pixel_values, **any_size_options(model)}


def export_model(model: PreTrainedModel, format: str, quantizer: Any = None) -> Any:
    """Make a program from a model, for any number of images of any valid size.

    BatchNorms are folded, in a copy of the model. Class-token variants interpolate their positions to the size of the
    image. Both sides of an image must be multiples of `config.total_stride`. Given another image, `"torch"` and
    `"onnx"` programs raise an error, and `"openvino"` programs ignore what is too much on the right and at the bottom.
    A `"torch"` program needs sides of at least two strides, and runs on the device of the model only.

    Args:
        model: a classifier or headless model of this family.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        quantizer: one of `transformers.exporters` that supports the format; default: float32.

    Returns:
        The library's `ExportedModel`, which can be called like the model, saved and loaded.

    Raises:
        ValueError, ImportError: see [`check_format`].
    """
    check_format(format)
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

    model = copy.deepcopy(model)
    fold_batch_norms(model)
    if hasattr(model, "classifier"):
        return_logits_only(model)
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
            node.metadata_props.clear()  # the line of code that it comes from, with paths of this machine
    exported.config = None  # a config.json beside the program would make loading ask for the model's code
    return exported


def refuse_remainders(program: Any) -> None:
    """Make an ONNX program raise an error where it would crop an image, as [`whole_strides`] told it to.

    The whole image is reshaped to the shape of the cropped one. This changes nothing if there is nothing to crop, and
    is an error of ONNX Runtime if there is, because the number of pixels differs.
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


def int8_quantizer() -> Any:
    """A quantizer for `"onnx"`: matrix products in int8, without calibration.

    Weights are int8. Inputs are converted when the program runs, by the range of values in the whole batch, so that the
    scores of an image depend slightly on the other images. Convolutions stay in float32, because in int8 they were
    slower (grouped ones much slower) and less exact, see results/LOG.md.
    """
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    matrix_products: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "extra_options": {"MatMulConstBOnly": True},
    }
    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, **matrix_products))


def load_exported(folder: str | Path, **options: Any) -> Any:
    """Load a saved program, which can be called like the model that it was made from.

    Args:
        options: for the library's runner of the format: `session_options` for ONNX Runtime, `config` for OpenVINO.
            OpenVINO computes in float32 unless `config` says otherwise. (Its own default is bfloat16 on processors that
            have it.)

    Raises:
        OSError: there is no program in this folder.
    """
    from transformers.exporters import ExportedModel

    manifest = json.loads((Path(folder) / MANIFEST).read_text())
    if manifest["export_format"] == "openvino":
        options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}, **options}
    return ExportedModel.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def compare(exported: Any, model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, float]:
    """Measure how far the outputs of a program are from the model's on some images.

    Returns:
        `max_over_std` and `rms_over_std`: the largest and the root mean square difference, over the standard deviation
        of the model's output. With several outputs, those of the worst one. For classifiers also `same_top1_percent`:
        the share of images for which both name the same class.
    """
    inputs = forward_inputs(model, pixel_values)
    expected, outputs = model(**inputs), exported(**inputs)
    names = ["logits"] if "logits" in expected else list(expected)
    differences = [(outputs[name].float() - expected[name]) / expected[name].std() for name in names]
    figures = {
        "max_over_std": max(difference.abs().max().item() for difference in differences),
        "rms_over_std": max(difference.square().mean().sqrt().item() for difference in differences),
    }
    if "logits" in expected:
        same = outputs["logits"].argmax(-1) == expected["logits"].argmax(-1)
        figures["same_top1_percent"] = 100 * same.float().mean().item()
    return figures


def read_batch(processor: Any, pictures: list[Any], batch: int, height: int, width: int) -> torch.Tensor:
    """A batch of pictures, `(batch, C, height, width)`. If there are too few, the first ones are repeated."""
    chosen = [pictures[index % len(pictures)] for index in range(batch)]
    return processor(chosen, size={"height": height, "width": width}, return_tensors="pt").pixel_values


def verify(
    exported: Any, model: PreTrainedModel, processor: Any, pictures: list[Any], int8: bool = False
) -> list[dict[str, Any]]:
    """Compare a program with the model on pictures of three sizes, two of them not square, alone and in batches.

    Returns:
        For each batch its size and the figures of [`compare`].

    Raises:
        ValueError: the outputs differ by more than `TOLERANCE`, those of an int8 program by more than `INT8_TOLERANCE`.
    """
    stride, (height, width) = model.config.total_stride, model.config.image_height_width
    sizes = ((1, height, width), (3, height, width), (1, height + 2 * stride, width), (2, height, width + 3 * stride))
    name, limit = ("rms_over_std", INT8_TOLERANCE) if int8 else ("max_over_std", TOLERANCE)
    checks = []
    for batch, rows, columns in sizes:
        figures = compare(exported, model, read_batch(processor, pictures, batch, rows, columns))
        checks.append({"batch": batch, "height": rows, "width": columns, **figures})
        if not figures[name] <= limit:  # also if the figure is not a number
            raise ValueError(
                f"the exported program disagrees with the model by {figures[name]:.2g} ({name}) on {batch} pictures of"
                f" {rows}×{columns} pixels, at most {limit} was expected"
            )
    return checks


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """[`whole_folder`], which replaces an earlier export, but keeps it if anything fails.

    Raises:
        FileExistsError: there is something at `output` that is no export.
    """
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise FileExistsError(f"{output} exists already and is no export: choose another --output")
    with whole_folder(output) as unfinished:
        yield unfinished
        shutil.rmtree(output, ignore_errors=True)


def export_folder(
    source: str | Path, format: str, pictures: list[Any], output: str | Path | None = None, int8: bool = False
) -> dict[str, Any]:
    """Export a saved model, and compare the program with it. If they disagree, nothing is written.

    Args:
        source: folder or Hub name of a classifier or headless model of this family.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        pictures: what to compare on: paths, or anything else that the image processor takes.
        output: folder to write; default: `onnx` (or the other format) in the source, `onnx_int8` for int8.
        int8: whether matrix products are computed in int8, see [`int8_quantizer`].

    Returns:
        `output`, `format`, `dtype`, `bytes`, `seconds`, and `checks`, the comparison.

    Raises:
        ValueError: the format or the model cannot be exported, the program disagrees with the model, a picture cannot
            be read, `output` is missing for a name on the Hub, or the format has no int8.
        OSError: something cannot be read or written.
        ImportError: a package is missing.
    """
    check_format(format)
    if int8 and format != "onnx":
        raise ValueError(f"int8 goes with the format onnx, not with {format}")
    if output is None and not Path(source).is_dir():
        raise ValueError(
            f"{source} is no folder here; for a model of the Hub or of the package, say where to write with --output"
        )
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
