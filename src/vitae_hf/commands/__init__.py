# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What people run, a module each: `main` takes the words of a command line and returns the record that it prints."""

import argparse


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring, with its lines as they are."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(command, description=description, formatter_class=formatter)
