# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How does a model classify my pictures, and what does it look at or find? Serves a page for the browser.

    vitae app          # then open the address that it prints

Visitors can choose the classifiers, detectors and segmenters in `outputs` (where `make demo` and trainings write) and
those that `--model` names (by default the demo's, else the small one that the package carries), or type the name of a
classifier on the Hub. The page loads nothing else from elsewhere. With `--host 0.0.0.0` other machines can open the
page, by the names and addresses of this one. Visitors can then not type Hub names, unless `--hub_names` is given.
Behind a proxy, `--trusted_host` is the name by which people open the page.
"""

import argparse
import os
from pathlib import Path


os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from ..files import PICTURES  # noqa: E402
from ..web.page import serve  # noqa: E402
from ..web.visitors import Models  # noqa: E402
from . import command_parser  # noqa: E402


DEMO = "outputs/vitae-nano-fashion"  # what `make demo` trains here
CARRIED = "vitae-nano-fashion"  # what it trained for the package


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae app", __doc__)
    parser.add_argument("--model", nargs="+", default=[], help="folders and Hub names to offer, the default first")
    parser.add_argument(
        "--models", type=Path, default=Path("outputs"), help="folder whose models are offered; default: outputs"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1; 0.0.0.0 lets other machines in"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--trusted_host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names by which the page is opened, such as that of a proxy",
    )
    parser.add_argument(
        "--hub_names",
        action=argparse.BooleanOptionalAction,
        help="let visitors type Hub names; default: if no other machine can open the page",
    )
    arguments = parser.parse_args(argv)
    if arguments.port is not None and not 0 < arguments.port < 65536:
        parser.error(f"--port must be a number from 1 to 65535, got {arguments.port}")
    if arguments.hub_names is None:
        arguments.hub_names = arguments.host in ("127.0.0.1", "localhost", "::1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    own = DEMO if Path(DEMO, "config.json").is_file() else CARRIED
    models = Models(arguments.model or [own], arguments.models, arguments.hub_names)
    serve(models, PICTURES, arguments.host, arguments.port, arguments.trusted_host)
