# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I publish a model? Checks its folder, uploads what belongs to it, loads it by name and compares the two.

    vitae push outputs/mine --repo_id org/vitae-mine --private

The folder is what `save_pretrained`, `vitae train` or `vitae convert` wrote, with a model card (`README.md`).
Everything goes into one commit. If that fails, run the command again: it uploads nothing twice.
"""

import argparse
from pathlib import Path
from typing import Any

from ..environment import environment
from ..failures import about
from ..hub.publishing import publish
from . import command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae push", __doc__)
    parser.add_argument("folder", type=Path, help="what to publish")
    parser.add_argument("--repo_id", required=True, help="organisation or user, and name: org/vitae-s")
    parser.add_argument("--private", action="store_true", help="create the repository for invited eyes only")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--create_pr", action="store_true", help="propose it as a pull request")
    target.add_argument("--revision", help="branch to upload to, created if need be; default: main")
    parser.add_argument("--dry-run", action="store_true", help="check and list, but neither write nor upload anything")
    parser.add_argument(
        "--image", help="what to try the model on; default: a photograph, or noise for other numbers of channels"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = vars(parse(argv))
    with about(arguments["repo_id"]):
        return {**publish(**arguments), **environment()}
