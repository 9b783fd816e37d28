# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I use one of the authors' checkpoints? Writes it as a folder that Transformers and the Hub understand.

    vitae convert ViTAE-S.pth.tar --output vitae-s --verify

The folder holds configuration, safetensors weights, image processor, model code, class names, checksums and a model
card: `vitae push` takes it as it is. Nothing in the checkpoint is executed, and no tensor is resized or left out; one
that does not fit is an error that names it.
"""

from pathlib import Path
from typing import Any

from ..environment import environment
from ..files import PICTURES
from ..hub.conversion import convert_checkpoint
from ..presets import PRESETS
from . import command_parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_parser("vitae convert", __doc__)
    parser.add_argument("checkpoint", type=Path, help="one of the authors' .pth or .pth.tar files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist yet or be empty")
    parser.add_argument("--preset", choices=list(PRESETS), help="which network it is; default: recognised")
    parser.add_argument(
        "--labels", type=Path, help="JSON list of class names; default: ImageNet-1k's for 1,000 classes"
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        type=Path,
        const=PICTURES[0],
        metavar="IMAGE",
        help="reload the folder and classify an image (default: a photograph of a cat) with it",
    )
    arguments = parser.parse_args(argv)
    record = convert_checkpoint(
        arguments.checkpoint, arguments.output, arguments.preset, arguments.labels, arguments.verify
    )
    return {**record, **environment()}
