# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the training commands: those of a recipe, a YAML file, and over them those of the command line."""

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..files import find_recipe
from .optimization import scaled_learning_rate


def parse_arguments(
    argv: list[str] | None, classes: tuple[type, ...], command: str, description: str, **defaults
) -> tuple:
    """Arguments from the command line over those of `--config`, as instances of these dataclasses.

    Args:
        argv: default: of this process.
        classes: the first is the command's own, whatever else it needs follows, the last is
            [`ViTAETrainingArguments`], whose `learning_rate` follows the global batch if the first has a
            `base_learning_rate`.
        command: whose arguments they are, as `vitae train`.
        description: of the command.
        defaults: of arguments that have another one here.

    Raises:
        ValueError: an argument is unknown, or excludes another.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(classes, prog=command, description=description, allow_abbrev=False)
    parser.set_defaults(report_to="tensorboard", logging_steps=50, logging_first_step=True, **defaults)
    parser.add_argument("--config", help="recipe: a name like vitae-t, or a YAML file of these arguments")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    recipe = {} if config is None else read_recipe(find_recipe(config), parser)
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    for name in ("learning_rate", "ema_decay"):  # the one that follows the batch, and the one that does not
        if {name, f"base_{name}"} <= given:
            raise ValueError(f"--{name} and --base_{name} exclude each other")
        if name in given:
            recipe.pop(f"base_{name}", None)
    parser.set_defaults(**recipe)
    for action in parser._actions:
        action.required = action.required and action.dest not in recipe
    run, *others, training, _ = parser.parse_args_into_dataclasses(argv)
    if getattr(run, "base_learning_rate", None) is not None:
        training.learning_rate = scaled_learning_rate(run.base_learning_rate, training.global_batch_size)
    training.remove_unused_columns = False
    return run, *others, training


def read_recipe(path: Path, parser: HfArgumentParser) -> dict:
    """The arguments in a YAML file, without what it says about itself, as the command line would have them.

    Raises:
        ValueError: it is no YAML of arguments, or a value is a list or mapping where one number is expected.
    """
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold arguments with their values, got a {type(recipe).__name__}")
    recipe.pop("about", None)
    known = {action.dest: action for action in parser._actions}
    for name, value in recipe.items():
        if name not in known:
            closest = get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"{path}: there is no argument {name!r}; did you mean {closest!r}?")
        if isinstance(value, list | dict) and known[name].nargs is None and known[name].type in (int, float):
            raise ValueError(f"{path}: {name} must be one number, got {value}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            recipe[name] = str(value)  # argparse converts and checks text alone
    return recipe
