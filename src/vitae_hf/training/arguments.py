# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the training commands: the dataclasses, the recipes in YAML files, and the command line over both."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..environment import has_bfloat16
from ..files import find_recipe
from ..presets import config_from_preset
from .optimization import scaled_ema_decay, scaled_learning_rate


class CommandHelp(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The lines of a description as they are, and after each argument its default, unless that is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


@dataclass(kw_only=True)
class RunArguments:
    """What to train on, in every task."""

    dataset: str = field(metadata={"help": "Hub name or local folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Its configuration, if several."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of images, if there are several."}
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Default: validation, else test."})


@dataclass(kw_only=True)
class StartArguments(RunArguments):
    """What a model for labelled data begins with: random weights or trained ones, and the names of its classes."""

    preset: str | None = field(default=None, metadata={"help": "From scratch: a name of PRESETS."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The trained model to begin with."})
    drop_path_rate: float | None = field(default=None, metadata={"help": "Default: the model's."})
    class_names: Path | None = field(
        default=None,
        metadata={"help": "Text file with a class on each line, or imagenet-1k; for data that do not name theirs."},
    )

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.model_name_or_path is None):
            raise ValueError(
                "give either --preset, to train from scratch, or --model_name_or_path, to begin with a trained model"
            )
        if self.preset is not None:
            config_from_preset(self.preset)  # an unknown one is an error now, not after the data have been read


@dataclass(kw_only=True)
class ImageArguments(RunArguments):
    """How to read images without masks, and how the recipe follows the batch."""

    eval_split: str | None = field(
        default=None, metadata={"help": "Default: validation, else test, else a part held out of the training images."}
    )
    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the images to hold out where no split is there to evaluate."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; default: the model's."})
    crop_pct: float = field(default=0.9, metadata={"help": "Crop ratio of the evaluation."})
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Sets learning_rate to this times global batch / 512."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training images from parquet or tar shards as they come."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Streaming: images that each worker holds to draw the next one from."}
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Whether an unreadable picture is an error, or skipped and counted."}
    )


@dataclass
class ViTAETrainingArguments(TrainingArguments):
    """`TrainingArguments`, and the parts of the authors' recipe that these lack.

    `learning_rate` is the full one, already scaled by the batch; `warmup_steps` is the library's: updates, or a share
    of the run if below 1. The schedule is the authors', whatever `lr_scheduler_type`. Where the library leaves speed to
    the user, the defaults here follow the machine: on a GPU that supports them, bfloat16, TF32, pinned memory and
    asynchronous copies to the GPU; and persistent workers where there are workers. `False` turns each of them off.

    Raises:
        ValueError: a value is out of bounds, two arguments exclude each other, or one process sees several GPUs.
    """

    if TYPE_CHECKING:  # after `__post_init__`, the library's and the one below
        output_dir: str = ""
        data_seed: int = 0
        tf32: bool | None = None
        ddp_find_unused_parameters: bool | None = None
        accelerator_config: Any = None

    # `None` leaves these three open until `__post_init__`; in the library they are never `None`.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16 autocast; default: on a GPU that has it."}
    )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: where there is a GPU."}
    )
    dataloader_persistent_workers: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: with workers."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})

    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a layer over that of the one above."})
    warmup_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the first update."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Floor of the cosine."})
    cooldown_epochs: float = field(
        default=0.0, metadata={"help": "How many of `num_train_epochs`, the last ones, are trained at the floor."}
    )
    channels_last: bool = field(
        default=True,
        metadata={"help": "Lay pixels and kernels out with channels last, for faster convolutions."},
    )
    merge_groups: bool = field(
        default=False,
        metadata={"help": "Compute grouped convolutions with as many groups merged as is fastest here, measured once."},
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "How often a batch repeats each of its pictures, augmented anew each time."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep an exponential moving average of the weights with this decay; 0: none."}
    )
    ema_warmup: bool = field(
        default=False,
        metadata={"help": "Raise the decay to `ema_decay` step by step, for short runs."},
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "Compute BatchNorm statistics over the batches of all GPUs together."}
    )
    frozen_batch_norm: bool = field(
        default=False, metadata={"help": "Train with the BatchNorm statistics that the model came with."}
    )

    def __post_init__(self) -> None:
        self._follow_machine()
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"one process cannot train on {self.n_gpu} GPUs: start `torchrun --nproc_per_node {self.n_gpu}` with"
                " the same script and arguments, or choose one GPU by CUDA_VISIBLE_DEVICES"
            )
        for name in self.report_to or []:
            if name in INTEGRATION_TO_CALLBACK and name not in (*get_available_reporting_integrations(), "flyte"):
                raise ValueError(f"--report_to {name}: its package is not installed")
            if isinstance(name, str) and name not in ("all", "none", *INTEGRATION_TO_CALLBACK):
                raise ValueError(f"--report_to {name}: it must be of {', '.join(INTEGRATION_TO_CALLBACK)}, all or none")
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"`per_device_eval_batch_size` must be at least 1, got {self.per_device_eval_batch_size}")
        if self.data_seed is None:
            self.data_seed = self.seed  # else each process would draw an order of its own for the data
        if self.learning_rate < 0:
            raise ValueError(f"`learning_rate` must be at least 0, got {self.learning_rate}")
        if self.repeated_augmentation < 1:
            raise ValueError(f"`repeated_augmentation` must be at least 1, got {self.repeated_augmentation}")
        if self.sync_batch_norm and self.frozen_batch_norm:
            raise ValueError("`sync_batch_norm` and `frozen_batch_norm` exclude each other: frozen ones use no batch")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}")
        self.ema_decay = self.ema_decay or None
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"`num_train_epochs` must be above 0, got {self.num_train_epochs}")
        if not 0 <= self.cooldown_epochs < self.num_train_epochs:
            raise ValueError(
                f"`cooldown_epochs` must be at least 0 and below `num_train_epochs`, {self.num_train_epochs};"
                f" got {self.cooldown_epochs}"
            )

    def _follow_machine(self) -> None:
        """Set what the user left open to what is fastest here."""
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        has_bf16 = has_gpu and has_bfloat16("cuda")
        if self.bf16 is None:
            self.bf16 = has_bf16 and not self.fp16
        if self.tf32 is None and has_bf16:  # the same generations of GPUs have both
            self.tf32 = True
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = has_gpu
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter of ViTAE is used
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}

    @property
    def device(self) -> torch.device:
        """The library's, but CPUs have no number: transformers 5.17 passes it to `torch.load`, which has no `cpu:0`."""
        return torch.device("cpu") if super().device.type == "cpu" else super().device

    @property
    def global_batch_size(self) -> int:
        """Images of one update, over all devices and accumulated batches."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps


def parse_arguments(
    argv: list[str] | None,
    classes: tuple[Any, ...],
    command: str,
    description: str | None,
    idle: Mapping[str, str] = MappingProxyType({}),
    **defaults: Any,
) -> tuple[Any, ...]:
    """The arguments of a command line as instances of these dataclasses; it overrides the recipe of `--config`.

    Args:
        argv: default: of this process.
        classes: the first is derived from [`RunArguments`], the last is [`ViTAETrainingArguments`].
        command: as users type it, such as `vitae train`.
        description: of the command, for `--help`.
        idle: arguments without an effect, each with the reason.
        defaults: of arguments whose default differs for this command.

    Raises:
        ValueError: an argument is unknown, has no effect, or excludes another.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"{command} --ARGUMENT VALUE …   (`{command} --help` lists the arguments)"  # a whole one fills the screen
    texts: dict[str, Any] = {"prog": command, "usage": usage, "description": description}
    parser = HfArgumentParser(classes, allow_abbrev=False, formatter_class=CommandHelp, **texts)
    parser.set_defaults(report_to="tensorboard", logging_steps=50, logging_first_step=True, **defaults)
    parser.add_argument("--config", help="recipe: a name like vitae-t, or a YAML file of these arguments")
    recipe = override_recipe(read_config(argv, parser), argv)
    for name in sorted(idle.keys() & (given_in(argv) | recipe.keys())):
        raise ValueError(f"--{name} has no effect in `{command}`: {idle[name]}")
    parser.set_defaults(**recipe)
    for action in parser._actions:
        action.required = action.required and action.dest not in recipe
    run, *others, training, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        refuse_unknown(unknown[0], parser)
    scale_by_batch(run, training)
    training.remove_unused_columns = False
    return run, *others, training


def refuse_unknown(word: str, parser: HfArgumentParser) -> None:
    """Say of the first word that is no argument what it may have meant.

    Raises:
        ValueError: always.
    """
    closest = get_close_matches(word.split("=")[0], parser._option_string_actions, n=1)
    hint = f"did you mean {closest[0]}?" if closest else f"`{parser.prog} --help` lists the arguments"
    raise ValueError(f"there is no argument {word!r}; {hint}")


def read_config(argv: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    """The recipe that `--config` names, or an empty one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    return {} if config is None else read_recipe(find_recipe(config), parser)


def given_in(argv: list[str]) -> set[str]:
    """The names of the arguments on a command line."""
    return {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def override_recipe(recipe: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """The recipe without its rules for values that the command line gives outright, and without its own beginning if
    the command line gives another.

    Raises:
        ValueError: the command line gives both a value and the rule for it.
    """
    given = given_in(argv)
    for name in ("learning_rate", "ema_decay"):
        if {name, f"base_{name}"} <= given:
            raise ValueError(f"--{name} and --base_{name} exclude each other")
        if name in given:
            recipe.pop(f"base_{name}", None)
    for name, other in (("preset", "model_name_or_path"), ("model_name_or_path", "preset")):
        if other in given and name not in given:
            recipe.pop(name, None)
    return recipe


def scale_by_batch(run: RunArguments, training: ViTAETrainingArguments) -> None:
    """Set the learning rate and the decay of the average from the `base_` values of a recipe and the global batch.

    Raises:
        ValueError: one of them is out of bounds.
    """
    learning_rate, ema_decay = getattr(run, "base_learning_rate", None), getattr(run, "base_ema_decay", None)
    if learning_rate is not None:
        if learning_rate < 0:
            raise ValueError(f"`base_learning_rate` must be at least 0, got {learning_rate}")
        training.learning_rate = scaled_learning_rate(learning_rate, training.global_batch_size)
    if ema_decay is not None:
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`base_ema_decay` must be at least 0 and below 1, got {ema_decay}")
        training.ema_decay = scaled_ema_decay(ema_decay, training.global_batch_size) or None


def read_recipe(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """The arguments in a YAML file, without its section `about`; numbers are text, as on a command line.

    Raises:
        ValueError: it is no YAML of arguments, or a value is missing, or several where one is expected.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold arguments with their values, got a {type(recipe).__name__}")
    recipe.pop("about", None)
    known = {action.dest: action for action in parser._actions}
    for name, value in recipe.items():
        if name not in known:
            closest = get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"{path}: there is no argument {name!r}; did you mean {closest!r}?")
        if value is None:
            raise ValueError(f"{path}: {name} has no value: write one, or leave the line out")
        try:
            recipe[name] = as_given(value, known[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name} {error}") from None
    return recipe


def as_given(value: Any, action: argparse.Action) -> Any:
    """A value of a recipe as it is on a command line, since argparse converts defaults that are text, and no others.

    Raises:
        ValueError: it is none of the choices, or not of the type of the argument.
    """
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML reads as `false`
    if action.nargs in ("+", "*"):
        values = value if isinstance(value, list) else [value]
        return [converted(item, action) for item in values]
    if isinstance(value, list | dict) and action.nargs is None and action.type in (int, float, Path):
        raise ValueError(f"must be one value, got {value}")
    if action.choices and str(value) not in map(str, action.choices):
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def converted(item: Any, action: argparse.Action) -> Any:
    """An item of a list by the type of its argument."""
    kind: Any = action.type
    try:
        return kind(str(item)) if kind in (int, float, Path) else item
    except ValueError:
        raise ValueError(f"must be of type {kind.__name__}, got {item!r}") from None
