# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I run a trained model without transformers, or without torch? Writes it as a program, beside the model.

    vitae export outputs/mine --format onnx
    vitae export outputs/mine --format onnx --quantize int8
    vitae export outputs/mine --format web --page

Programs of onnx, torch and openvino take any number of images, of any size that the model takes; those of the other
formats images of the model's own size. The command compares the program with the model on real pictures, of each size
and number that it takes. If they disagree, nothing is written and the exit status is 1. In a checkout,
`examples/run_onnx.py` classifies pictures with the first of the programs above.

The format `web` is for JavaScript: programs that transformers.js opens, and the exact preprocessing. `--page` adds a
page that classifies pictures in the browser. It takes the npm package onnxruntime-web, which is looked for in
`node_modules` here and above.
"""

from pathlib import Path
from typing import Any

from ..deployment.browser import export_for_browser
from ..deployment.exporting import BACKENDS, export_folder
from ..environment import environment
from ..failures import about
from . import command_parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_parser("vitae export", __doc__)
    parser.add_argument("source", help="folder or Hub name of a classifier or headless model")
    parser.add_argument("--format", required=True, choices=[*BACKENDS, "web"])
    parser.add_argument("--output", type=Path, help="default: SOURCE/FORMAT, or SOURCE/FORMAT_int8")
    parser.add_argument(
        "--images",
        nargs="+",
        help="pictures to compare on; default: those that the package carries, or noise for other numbers of channels",
    )
    parser.add_argument("--quantize", choices=["int8"], help="compute matrix products in int8; only with onnx")
    parser.add_argument("--page", action="store_true", help="write a page for the browser too; only with web")
    parser.add_argument("--runtime", type=Path, help="with --page: where the npm package onnxruntime-web is")
    arguments = parser.parse_args(argv)
    source, format, images, output = arguments.source, arguments.format, arguments.images, arguments.output
    if format == "web" and arguments.quantize:
        raise ValueError("the format web has programs in float32, float16 and int8 anyway: leave --quantize out")
    if format != "web" and (arguments.page or arguments.runtime):
        raise ValueError(f"--page and --runtime go with the format web, not with {format}")
    with about(source):
        if format == "web":
            record = export_for_browser(source, images, output, arguments.page, arguments.runtime)
        else:
            record = export_folder(source, format, images, output, arguments.quantize == "int8")
    return {**record, **environment()}
