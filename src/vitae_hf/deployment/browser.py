# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained model as a folder for JavaScript: ONNX programs that transformers.js opens, the exact preprocessing, and,
on request, a page for the browser."""

import copy
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..failures import first_line
from ..files import PACKAGE, size_of, write_json
from ..hub.cards import space_card
from ..loading import example_pictures, label_names
from .exporting import (
    MANIFEST,
    check_format,
    int8_quantizer,
    load_for_export,
    output_folder,
    replaced_folder,
    trace,
    verify,
)
from .folding import fold_batch_norms


FILES = {"float32": "onnx/model.onnx", "float16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}
"""The dtypes of programs, and the names under which transformers.js looks for them."""
LARGEST = 2**31
"""A file of protobuf, and an array of most browsers, has fewer bytes than this."""
ORIGINAL = "original"
"""The folder with the model's own configuration and settings of preprocessing."""
JAVASCRIPT = PACKAGE / "deployment" / "javascript"
PREPROCESSING = "preprocessing.mjs"
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""The files of ONNX Runtime Web that the page needs, without WebGPU and with it."""


def find_runtime(path: str | Path | None = None) -> Path:
    """The folder with the files of ONNX Runtime Web.

    Args:
        path: the package `onnxruntime-web` of npm, its folder `dist`, or a folder with `node_modules`. Default: the
            current folder or the nearest one above it that has the package.

    Raises:
        FileNotFoundError: it is not there, or not whole.
    """
    roots = [Path(path)] if path else [Path.cwd(), *Path.cwd().parents]
    places = [place for root in roots for place in (root, root / "dist", root / "node_modules/onnxruntime-web/dist")]
    for place in places:
        if all((place / name).is_file() for name in RUNTIME):
            return place
    where = f"not whole in {path}" if path else f"not in node_modules of {Path.cwd()} or above"
    raise FileNotFoundError(
        f"the page takes ONNX Runtime Web, which is {where}: `npm install --ignore-scripts onnxruntime-web` fetches it"
        " here, and --runtime FOLDER says where else it is"
    )


def check_runnable(model: PreTrainedModel, processor: Any, page: bool) -> None:
    """Raise an error unless transformers.js, and the page if there is to be one, can run a model.

    Raises:
        ValueError: it cannot; the message says why.
    """
    size = processor.size
    if model.config.num_channels != 3:
        raise ValueError(f"the format web takes models of three channels, got {model.config.num_channels}")
    if not processor.do_resize or size["height"] != size["width"]:
        shape = f"{size['height']}×{size['width']} pixels" if processor.do_resize else "pictures of any size"
        raise ValueError(f"the format web takes models of square pictures, as transformers.js resizes to; got {shape}")
    if (size_in_bytes := 4 * model.num_parameters()) >= LARGEST:
        raise ValueError(f"browsers open files of less than {LARGEST:,} bytes; this model has {size_in_bytes:,}")
    if hasattr(model, "classifier") and (model.config.num_labels == 1 or model.config.problem_type == "regression"):
        raise ValueError(
            "transformers.js takes every classifier for one of several labels, which a regression or a single label is"
            " not: choose another format"
        )
    if page and not hasattr(model, "classifier"):
        raise ValueError(f"the page shows what a classifier says; got {type(model).__name__}, which says nothing")


def return_features_too(model: PreTrainedModel) -> None:
    """Make a model take float32, whatever its own dtype, and return its scores and all its features in float32."""
    classifier: Any = getattr(model, "classifier", None)

    @functools.wraps(model.forward)
    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        features = model.base_model(pixel_values.to(model.dtype), **kwargs)
        outputs = {"last_hidden_state": features.last_hidden_state, "pooler_output": features.pooler_output}
        if classifier is not None:
            outputs = {"logits": classifier(features.pooler_output), **outputs}
        return {name: values.float() for name, values in outputs.items()}

    model.forward = forward


def take_float32(program: Any) -> None:
    """Make an ONNX program in float16 take pictures in float32."""
    import onnx_ir

    image = program.graph.inputs[0]
    cast = onnx_ir.node("Cast", [image], {"to": onnx_ir.DataType.FLOAT16})
    cast.outputs[0].shape, cast.outputs[0].type = image.shape, image.type
    image.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, image)
    image.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    program.graph.insert_before(program.graph[0], cast)


def make_programs(model: PreTrainedModel) -> dict[str, Callable[[], Any]]:
    """For each dtype, a function that makes the ONNX program. Float32 is traced once, for int8 too."""
    from transformers.exporters.configs import ExportFormat

    model = copy.deepcopy(model)
    fold_batch_norms(model)

    @functools.cache
    def float32() -> Any:
        return_features_too(model)
        return trace(model, "onnx").program

    def float16() -> Any:
        half = copy.deepcopy(model).half()
        return_features_too(half)
        program = trace(half, "onnx").program
        take_float32(program)
        return program

    def int8() -> Any:
        return int8_quantizer().quantize(float32(), {}, ExportFormat.ONNX)

    return {"float32": float32, "float16": float16, "int8": int8}


def open_program(path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """An ONNX program as a function, which can be compared with its model."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {"pixel_values": pixel_values.numpy()}))))

    return run


def write_programs(
    model: PreTrainedModel, processor: BaseImageProcessor, pictures: list[Any], folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a program of each dtype, each a single file, unless it fails or disagrees with the model.

    Returns:
        For each dtype, the file, its size and the comparison; and for each dtype that was left out, the reason.

    Raises:
        ValueError: the one in float32 disagrees.
    """
    import onnx_ir

    (folder / "onnx").mkdir()
    written, refused, programs = {}, {}, make_programs(model)
    for dtype, name in FILES.items():
        path = folder / name
        try:
            onnx_ir.save(programs[dtype](), path)
            checks = verify(open_program(path), model, processor, pictures, dtype)
        except Exception as error:  # the runtime's own ones have no other base class
            if dtype == "float32":
                raise
            path.unlink(missing_ok=True)
            refused[dtype] = first_line(error)
        else:
            written[dtype] = {"file": name, "bytes": path.stat().st_size, "checks": checks}
    return written, refused


def javascript_config(config: PreTrainedConfig, is_classifier: bool) -> dict[str, Any]:
    """A configuration that transformers.js opens: it knows no ViTAE, but runs any network under the name of ViT."""
    names = label_names(config) if is_classifier else {}
    numbers = {name: number for number, name in names.items()}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if is_classifier else "ViTModel"],
        "image_size": config.image_size,
        "num_channels": config.num_channels,
        **({"id2label": names, "label2id": numbers, "problem_type": config.problem_type} if is_classifier else {}),
        "transformers.js_config": {"dtype": "fp32"},  # its default is int8 in WebAssembly
    }


def javascript_preprocessing(processor: Any) -> dict[str, Any]:
    """Settings with which transformers.js comes as near to an image processor's pixels as its filters allow."""
    names = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    return {
        "image_processor_type": "ViTImageProcessor",
        **{name: getattr(processor, name) for name in names},
        "size": {"shortest_edge": int(processor.size["height"] / processor.crop_pct)},
        "do_center_crop": True,
        "crop_size": {name: processor.size[name] for name in ("height", "width")},
        "resample": 1,  # Lanczos, its only filter that is antialiased outside of browsers
    }


def write_settings(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write the configurations for transformers.js, beside them the model's own ones, and the exact preprocessing."""
    (folder / ORIGINAL).mkdir()
    (folder / ORIGINAL / "config.json").write_text(model.config.to_json_string(), encoding="utf-8")
    (folder / ORIGINAL / "preprocessor_config.json").write_text(processor.to_json_string(), encoding="utf-8")
    settings = {
        "config.json": javascript_config(model.config, hasattr(model, "classifier")),
        "preprocessor_config.json": javascript_preprocessing(processor),
    }
    for name, fields in settings.items():
        write_json(fields, folder / name, indent=2)
    shutil.copy(JAVASCRIPT / PREPROCESSING, folder)


def write_page(folder: Path, runtime: Path) -> None:
    """Write the page into a folder with programs and settings."""
    for name in ("index.html", "page.js", "style.css"):
        shutil.copy(JAVASCRIPT / name, folder)
    (folder / "onnxruntime").mkdir()
    for name in RUNTIME:
        shutil.copy(runtime / name, folder / "onnxruntime")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    version = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    worker = (JAVASCRIPT / "service-worker.js").read_text(encoding="utf-8")
    (folder / "service-worker.js").write_text(worker.replace("{version}", version[:16]), encoding="utf-8")


def write_card(folder: Path) -> None:
    """Write the README of a Space into a folder with a page."""
    name = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["name"]
    settings = {
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "static",
        "app_file": "index.html",
        "custom_headers": {  # without which browsers give a page no threads
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-resource-policy": "cross-origin",
        },
    }
    text = (
        f"Classifies a picture with {name} in the visitor's browser, which keeps the picture to itself.\n"
        "The licence above is that of the page; ONNX Runtime Web, in `onnxruntime`, is under the MIT licence.\n"
    )
    description = "ViTAE names what is in a picture, in your browser"
    (folder / "README.md").write_text(
        space_card(name, settings, description, "transformers.js", text), encoding="utf-8"
    )


def export_for_browser(
    source: str | Path,
    pictures: list[Any] | None,
    output: str | Path | None = None,
    page: bool = False,
    runtime: str | Path | None = None,
) -> dict[str, Any]:
    """Write a saved model for JavaScript, and compare the programs with it.

    Args:
        source: folder or Hub name of a classifier or headless model of this family.
        pictures: what to compare on: paths, or anything else that the image processor takes; `None`:
            [`example_pictures`].
        output: folder to write; default: `web` in the source.
        page: whether to write a page for the browser too.
        runtime: where ONNX Runtime Web is, for the page; see [`find_runtime`].

    Returns:
        `output`, `format`, `bytes` (of the whole folder), `seconds`, `programs` and `refused`, see [`write_programs`].

    Raises:
        ValueError: the model cannot be exported, the float32 program disagrees with it, a picture cannot be read, or
            `output` is missing for a name on the Hub.
        OSError: something cannot be read or written, or ONNX Runtime Web is not found.
        ImportError: a package is missing.
    """
    check_format("onnx")
    runtime_files = find_runtime(runtime) if page else None
    output = output_folder(source, output, "web")
    started = time.perf_counter()
    with replaced_folder(output) as unfinished:
        model, processor = load_for_export(source)
        check_runnable(model, processor, page)
        pictures = pictures or example_pictures(processor)
        programs, refused = write_programs(model, processor, pictures, unfinished)
        write_settings(model, processor, unfinished)
        name = Path(source).resolve().name if Path(source).is_dir() else str(source)
        manifest = {"export_format": "web", "name": name, "programs": programs, "refused": refused}
        write_json(manifest, unfinished / MANIFEST, indent=2)
        if runtime_files:
            write_page(unfinished, runtime_files)
        size = size_of(unfinished)
    return {
        "output": str(output),
        "format": "web",
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 1),
        "programs": programs,
        "refused": refused,
    }
