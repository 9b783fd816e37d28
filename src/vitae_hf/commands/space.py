# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I show a model to everyone? Writes its page as a folder that runs as a static Hugging Face Space.

    npm install --ignore-scripts onnxruntime-web
    vitae space outputs/mine --static --output outputs/space

The network runs in the visitors' browsers: the Space needs no server, and their pictures stay with them. `python -m
http.server --directory outputs/space` shows the page here. These commands publish it, or update it:

    hf repos create org/vitae-mine-page --type space --space-sdk static --exist-ok
    hf upload org/vitae-mine-page outputs/space --type space

In a checkout, `scripts/build_space.py` writes the other kind of Space, which runs Python and shows attention.
"""

from pathlib import Path
from typing import Any

from ..deployment.browser import export_for_browser, write_card
from ..environment import environment
from ..failures import about
from . import command_parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_parser("vitae space", __doc__)
    parser.add_argument("source", help="folder or Hub name of a classifier")
    parser.add_argument("--static", action="store_true", required=True, help="the kind of Space: files, no server")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--runtime", type=Path, help="where the npm package onnxruntime-web is")
    arguments = parser.parse_args(argv)
    with about(arguments.source):
        record = export_for_browser(arguments.source, None, arguments.output, True, arguments.runtime)
        write_card(arguments.output)
    return {**record, **environment()}
