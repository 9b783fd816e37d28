# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `vitae`: a table of names, each of which is a module of `vitae_hf.commands`.

It lies beside the package and not in it, because importing the package imports torch, which takes seconds, and
`vitae --help` needs neither.
"""

import importlib
import importlib.metadata
import sys
from difflib import get_close_matches
from types import ModuleType
from typing import Any, NamedTuple


class Command(NamedTuple):
    summary: str
    extra: str | None = None  # of the package, which the command needs


COMMANDS = {
    "train": Command("train a classifier, from scratch or from a trained model", "train"),
    "pretrain": Command("pretrain a network on pictures without labels", "train"),
    "segment": Command("train UperNet to say what each pixel of a picture is", "train"),
    "detect": Command("train a detector to find objects in pictures, by boxes or masks", "detection"),
    "evaluate": Command("measure a classifier, segmenter or detector, also by class", "train"),
    "predict": Command("write labels and features of any number of pictures", "train"),
    "probe": Command("measure how well features tell classes apart, by simple classifiers", "train"),
    "search": Command("find the pictures of a folder that are most like given ones", "train"),
    "explain": Command("draw what a classifier saw in a picture, cell by cell", "explain"),
    "export": Command("write a model as a program for other runtimes, or for the browser", "export"),
    "space": Command("write a model's page as a folder for a static Hugging Face Space", "export"),
    "convert": Command("write a checkpoint of the authors as a folder for Transformers", "train"),
    "push": Command("publish a model on the Hub, and compare what arrives"),
    "verify": Command("compare the files of a model with their checksums"),
    "benchmark": Command("measure speed and memory of classifiers side by side", "train"),
    "app": Command("show in the browser what a classifier sees in a picture", "demo"),
}
USAGE = """usage: vitae COMMAND …

{commands}

`vitae COMMAND --help` lists what a command takes; `vitae --version` prints the version."""


def main(argv: list[str] | None = None) -> None:
    """Run a command with its arguments, and end the process with its status."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}  {c.summary}" for name, c in COMMANDS.items())))
    elif name == "--version":
        print(importlib.metadata.version("vitae-hf"))
    elif name not in COMMANDS:
        closest = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {closest[0]!r}?" if closest else "`vitae` lists the commands"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        try:
            run(name, words)
        except KeyboardInterrupt:  # while packages are imported
            sys.exit(130)


def run(name: str, words: list[str]) -> None:
    """Run a command, and end the process as [`run_command`] does."""
    from vitae_hf.failures import of_a_missing_package, run_command

    def main(words: list[str] | None) -> dict[str, Any] | None:
        try:
            return load(name).main(words)
        except ModuleNotFoundError as error:
            if sentence := of_a_missing_package(error, f"`vitae {name}`", COMMANDS[name].extra):
                raise ImportError(sentence) from error
            raise

    def status(record: dict[str, Any]) -> int:
        return getattr(load(name), "status", lambda record: 0)(record)

    run_command(main, words, status)


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"vitae_hf.commands.{name}")


if __name__ == "__main__":
    main()
