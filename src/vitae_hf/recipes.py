# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Recipes: YAML files of a script's arguments, behind which the command line counts more."""

import argparse
from difflib import get_close_matches
from pathlib import Path

import yaml


def find_recipe(argv: list[str], parser: argparse.ArgumentParser) -> dict:
    """The arguments in the file that `--config` names; none without it. The parser gets that argument too.

    Raises:
        ValueError: the file has an argument that the parser lacks; the message names the closest.
    """
    parser.add_argument("--config", type=Path, help="recipe: a YAML file of these arguments")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(argv)[0].config
    return {} if config is None else read_recipe(config, parser)


def read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict:
    """The arguments in a YAML file; its entry `about` is for people."""
    recipe = yaml.safe_load(path.read_text()) or {}
    recipe.pop("about", None)
    known = {action.dest for action in parser._actions}
    for name in recipe.keys() - known:
        closest = get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"{path}: there is no argument {name!r}; did you mean {closest!r}?")
    return recipe


def use_recipe(recipe: dict, parser: argparse.ArgumentParser) -> None:
    """Make a recipe's values the parser's defaults; what it has need not be on the command line."""
    parser.set_defaults(**recipe)
    for action in parser._actions:
        action.required = action.required and action.dest not in recipe
