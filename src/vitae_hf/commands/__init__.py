# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What people run, a module each: `main` takes the words of a command line and returns the record that it prints."""

import argparse
from typing import Any


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring, with its lines as they are."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(command, description=description, formatter_class=formatter)


class _Sides(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            parser.error(f"--{self.dest} takes a side, or height and width")
        setattr(namespace, self.dest, values)


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """`--image_size`: the side of the pictures, or their height and width."""
    help = "side, or height and width, in pixels"
    parser.add_argument("--image_size", type=int, nargs="+", action=_Sides, help=help)
