# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model written as a program for other runtimes, in float32, or int8 for ONNX.

The programs for ONNX, `torch.export` and OpenVINO are made by the exporters of transformers (`transformers.exporters`)
and take any number of images of any valid size; [`export_model`] says what each does with images of other sizes. Those
for phones and for machine code take images of one size: ExecuTorch, by the same exporters, and what `fixed_size.py`
writes.
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

from ..failures import EXTRAS, first_line
from ..files import size_of, whole_folder, write_json
from ..layers_vitae import ViTAEConvLayer
from ..loading import any_size_options, example_pictures, find_checked_model, load_trained
from ..model_folders import FAMILY
from ..training.merging import groups_of_width, merged_weight
from .fixed_size import RUNTIMES, load_program, write_program
from .folding import fold_batch_norms, is_plain


BACKENDS: dict[str, str | None] = {
    "onnx": "onnx",
    "torch": "dynamo",
    "openvino": "openvino",
    "executorch": "executorch",
    **dict.fromkeys(RUNTIMES),
}
"""Each format, and what the library calls it, if it writes it."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("litert_torch",),
    "coreml": ("coremltools",),
    "torch-aoti": (),
}
"""Each format, and the packages that it needs."""
OPEN_SIZES = ("onnx", "torch", "openvino")
"""The formats that take images of any size; the others take those of the model's own."""
OPEN_BATCHES = (*OPEN_SIZES, "torch-aoti")
"""The formats that take any number of images; the others take one."""
MERGED_WIDTH = {"onnx": 16, "openvino": 8}
"""The channels to which narrow groups of convolutions are merged, by format, because that runtime is faster with them:
measured in results/LOG.md. ONNX Runtime computes blocks of 16 channels."""
MANIFEST = "export.json"
"""The file that the library writes beside a program."""
TOLERANCES: dict[str, tuple[str, float]] = {
    "float32": ("max_over_std", 1e-4),  # measured: below 1e-5
    "float16": ("rms_over_std", 0.02),  # measured: below 0.004
    "int8": ("rms_over_std", 0.2),  # measured: below 0.05
}
"""Which figure of [`compare`] says how far a program of each dtype may be from the model, and how far at most."""


def has_module(name: str) -> bool:
    """Whether a module is installed. Of one inside of a package that is not, `find_spec` raises an error."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check_format(name: str) -> None:
    """Raise an error unless a format is known and can be written here.

    Raises:
        ValueError: there is no such format.
        ImportError: packages that it needs are not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"the format must be one of {', '.join(BACKENDS)}; got {name!r}")
    if BACKENDS[name] and not has_module("transformers.exporters.runners"):
        raise ImportError(f"exporting takes transformers 5.23 or newer, this is {transformers.__version__}")
    if missing := [package for package in PACKAGES[name] if not has_module(package)]:
        extra = next((extra for extra, modules in EXTRAS.items() if missing[0] in modules), "export")
        raise ImportError(
            f"the format {name} takes {', '.join(missing)}, not installed here: `pip install 'vitae-hf[{extra}]'`"
        )


def load_for_export(source: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a classifier or headless model in float32, with all its trained weights, and its image processor.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: see [`load_trained`], or it holds another kind of model.
    """
    config = AutoConfig.from_pretrained(find_checked_model(source))
    architecture = (config.architectures or [""])[0]
    others = ("Backbone", "ForMaskedImageModeling", "ForPreTraining")
    if config.model_type not in FAMILY or architecture.endswith(others):
        raise ValueError(
            f"{source} holds {architecture or config.model_type}: only classifiers and headless models of ViTAE and"
            " ViTAEv2 are exported"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"the weights of {source} are quantised: export the model that they were made from")
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


@torch.no_grad()
def widen_groups(model: nn.Module, width: int) -> None:
    """Merge narrow groups of convolutions, in place, into groups of about so many channels, with zeros between them."""
    for layer in model.modules():
        if not isinstance(layer, ViTAEConvLayer) or not is_plain(layer.conv):
            continue
        conv: Any = layer.conv
        if (merged := groups_of_width(conv.weight, conv.groups, width)) > 1:
            conv.weight = nn.Parameter(merged_weight(conv.weight, conv.groups, merged))
            conv.groups //= merged


def forward_inputs(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, Any]:
    """The arguments of `forward` for images of any size: the plain variants must interpolate their positions."""
    return {"pixel_values": pixel_values, **any_size_options(model)}


def export_model(model: PreTrainedModel, format: str, quantizer: Any = None) -> Any:
    """Make a program from a model, for any number of images of any valid size.

    BatchNorms are folded and narrow groups of convolutions merged ([`MERGED_WIDTH`]), in a copy of the model.
    Class-token variants interpolate their positions to the size of the image. Both sides of an image must be multiples
    of `config.total_stride`. Given another image, `"torch"` and `"onnx"` programs raise an error, and `"openvino"`
    programs ignore what is too much on the right and at the bottom.
    A `"torch"` program needs sides of at least two strides, and runs on the device of the model only. An `"executorch"`
    program takes one image of the model's own size, because its runtime sets memory aside for the largest one.

    Args:
        model: a classifier or headless model of this family.
        format: `"onnx"`, `"torch"`, `"openvino"` or `"executorch"`; [`write_model`] writes every format.
        quantizer: one of `transformers.exporters` that supports the format; default: float32.

    Returns:
        The library's `ExportedModel`, which can be called like the model, saved and loaded.

    Raises:
        ValueError, ImportError: see [`check_format`].
    """
    check_format(format)
    if BACKENDS[format] is None:
        raise ValueError(f"a program of the format {format} is not made in memory: `write_model` writes it to a folder")
    model = copy.deepcopy(model)
    fold_batch_norms(model)
    if format in MERGED_WIDTH and quantizer is None:  # int8 is chosen for small files, and zeros would be stored
        widen_groups(model, MERGED_WIDTH[format])
    if hasattr(model, "classifier"):
        return_logits_only(model)
    return trace(model, format, quantizer)


def trace(model: PreTrainedModel, format: str, quantizer: Any = None) -> Any:
    """Make a program that does what a model does, as it is. See [`export_model`]."""
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

    stride, (height, width) = model.config.total_stride, model.config.image_height_width
    is_open = format in OPEN_SIZES
    size = (2, height + stride, width + 2 * stride) if is_open else (1, height, width)
    example = torch.zeros(size[0], model.config.num_channels, *size[1:])
    inputs = forward_inputs(model, example.to(model.device))
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    shapes = {**dict.fromkeys(inputs), "pixel_values": dynamic} if is_open else None
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


def write_model(model: PreTrainedModel, format: str, folder: Path, quantizer: Any = None) -> None:
    """Write a model to a folder as a program of any format, see [`export_model`].

    Raises:
        ValueError, ImportError: see [`check_format`].
        OSError: something cannot be written.
    """
    check_format(format)
    if format not in RUNTIMES:
        export_model(model, format, quantizer).save_pretrained(folder)
        return
    model = copy.deepcopy(model).requires_grad_(False)
    fold_batch_norms(model)
    write_json(write_program(model, format, folder), folder / MANIFEST)


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
            have it.) For LiteRT, Core ML and AOTInductor see the `load` of their modules.

    Raises:
        OSError: there is no program in this folder.
    """
    manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    if manifest["export_format"] in RUNTIMES:
        return load_program(Path(folder), manifest, **options)
    from transformers.exporters import ExportedModel

    if manifest["export_format"] == "openvino":
        options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}, **options}
    return ExportedModel.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def compare(exported: Any, model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, float]:
    """Measure how far the outputs of a program are from the model's on some images.

    Returns:
        `max_over_std` and `rms_over_std`: the largest and the root mean square difference, over the standard deviation
        of the model's output. With several outputs, those of the worst one that both have. For classifiers also
        `same_top1_percent`:
        the share of images for which both name the same class.
    """
    inputs = forward_inputs(model, pixel_values)
    expected, outputs = model(**inputs), exported(**inputs)
    names = [name for name in expected if name in outputs]
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


def shapes_to_compare(model: PreTrainedModel, format: str, count: int) -> list[tuple[int, int, int, int]]:
    """Which of `count` pictures a program is compared on: the first one, how many, height and width.

    Formats that take any size get three, two of them not square, alone and in batches; the others each picture, alone
    where they take no batch.
    """
    stride, (height, width) = model.config.total_stride, model.config.image_height_width
    one_by_one = [(start, 1, height, width) for start in range(count)]
    if format not in OPEN_BATCHES:
        return one_by_one
    if format not in OPEN_SIZES:
        return [*one_by_one, (0, 3, height, width)]
    sizes = ((1, height, width), (3, height, width), (1, height + 2 * stride, width), (2, height, width + 3 * stride))
    return [(0, *size) for size in sizes]


def verify(
    exported: Any,
    model: PreTrainedModel,
    processor: Any,
    pictures: list[Any],
    dtype: str = "float32",
    format: str = "onnx",
) -> list[dict[str, Any]]:
    """Compare a program with the model on pictures, of the sizes and numbers of [`shapes_to_compare`].

    Returns:
        For each batch its size and the figures of [`compare`].

    Raises:
        ValueError: the program does not run, or its outputs differ by more than `TOLERANCES` has for programs of this
            dtype.
    """
    name, limit = TOLERANCES[dtype]
    checks = []
    for start, batch, rows, columns in shapes_to_compare(model, format, len(pictures)):
        pixel_values = read_batch(processor, pictures[start:], batch, rows, columns)
        try:
            figures = compare(exported, model, pixel_values)
        except RuntimeError as error:
            raise ValueError(f"the {dtype} program for {format} does not run here: {first_line(error)}") from error
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
        FileExistsError: there is something at `output` that is no export, or a clone of a repository, whose history
            would be lost.
    """
    if (output / ".git").exists():
        raise FileExistsError(f"{output} is a clone of a repository: choose another --output, and copy its files there")
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise FileExistsError(f"{output} exists already and is no export: choose another --output")
    before = output.with_name(f".{output.name}.before")
    with whole_folder(output) as unfinished:
        yield unfinished
        shutil.rmtree(before, ignore_errors=True)
        if output.exists():
            output.rename(before)
    shutil.rmtree(before, ignore_errors=True)


def output_folder(source: str | Path, output: str | Path | None, name: str) -> Path:
    """Where an export goes: `output`, by default the folder `name` in the source.

    Raises:
        ValueError: `output` is missing, and the source is no folder.
    """
    if output is None and not Path(source).is_dir():
        raise ValueError(
            f"{source} is no folder here; for a model of the Hub or of the package, say where to write with --output"
        )
    return Path(output or Path(source, name)).resolve()


def export_folder(
    source: str | Path, format: str, pictures: list[Any] | None, output: str | Path | None = None, int8: bool = False
) -> dict[str, Any]:
    """Export a saved model, and compare the program with it. If they disagree, nothing is written.

    Args:
        source: folder or Hub name of a classifier or headless model of this family.
        format: one of `BACKENDS`.
        pictures: what to compare on: paths, or anything else that the image processor takes; `None`:
            [`example_pictures`].
        output: folder to write; default: `onnx` (or the other format) in the source, `onnx_int8` for int8.
        int8: whether matrix products are computed in int8, see [`int8_quantizer`].

    Returns:
        `output`, `format`, `dtype`, `bytes`, `seconds`, and `checks`, the comparison. If the program cannot run on this
        machine, there are no checks, and `not_compared` says why.

    Raises:
        ValueError: the format or the model cannot be exported, the program disagrees with the model, a picture cannot
            be read, `output` is missing for a name on the Hub, or the format has no int8.
        OSError: something cannot be read or written.
        ImportError: a package is missing.
    """
    check_format(format)
    if int8 and format != "onnx":
        raise ValueError(f"int8 goes with the format onnx, not with {format}")
    output = output_folder(source, output, f"{format}_int8" if int8 else format)
    started, dtype = time.perf_counter(), "int8" if int8 else "float32"
    with replaced_folder(output) as unfinished:
        model, processor = load_for_export(source)
        pictures = pictures or example_pictures(processor)
        write_model(model, format, unfinished, int8_quantizer() if int8 else None)
        reason = RUNTIMES[format].why_not_here() if format in RUNTIMES else None
        checks = [] if reason else verify(load_exported(unfinished), model, processor, pictures, dtype, format)
        size = size_of(unfinished)
    return {
        "output": str(output),
        "format": format,
        "dtype": dtype,
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 1),
        "checks": checks,
        **({"not_compared": reason} if reason else {}),
    }
