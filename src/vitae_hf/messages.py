# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Names that others chose, as our messages show them: few, short, and unable to look like another line of output."""

from collections.abc import Iterable


MOST_NAMES = 10
MOST_LETTERS = 100  # of a name


def printable(name: object, most: int = MOST_LETTERS) -> str:
    """A name on one line: line breaks, control characters and changes of direction as escapes, `most` letters of it."""
    text = str(name)
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)


def listed(names: Iterable[object], separator: str = ", ") -> str:
    """The first ten names and how many there are beside; names may have come with a few words of ours."""
    names = list(names)
    shown = separator.join(printable(name, 2 * MOST_LETTERS) for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown}{separator}… and {len(names) - MOST_NAMES} more"
