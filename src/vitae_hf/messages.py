# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How messages show names that others chose: a few of them, each short and on one line.

A name with line breaks could otherwise look like another line of output.
"""

from collections.abc import Iterable


MOST_NAMES = 10
MOST_LETTERS = 100  # of a name


def printable(name: object, most: int = MOST_LETTERS) -> str:
    """At most `most` letters of a name on one line, its line breaks and control characters as escapes."""
    text = str(name)
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)


def listed(names: Iterable[object], separator: str = ", ") -> str:
    """The first ten names, and how many more there are. Each may contain a few words of a message too."""
    names = list(names)
    shown = separator.join(printable(name, 2 * MOST_LETTERS) for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown}{separator}… and {len(names) - MOST_NAMES} more"
