# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Is this model whole? Compares every file with its checksum: weights with a flipped byte load and raise no error.

    vitae verify org/vitae-s

The checksums are those of `SHA256SUMS`, which published folders carry, and, for a name on the Hub, the Hub's own. If a
file is damaged or missing, the command names it and ends with status 1.
"""

from typing import Any

from ..failures import about
from ..files import find_model
from ..hub.checksums import verify_checkpoint
from ..hub.publishing import in_words
from . import command_parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_parser("vitae verify", __doc__)
    parser.add_argument("source", help="folder or Hub name of a model")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    arguments = parser.parse_args(argv)
    with about(arguments.source):
        record = verify_checkpoint(find_model(arguments.source), arguments.revision)
    if record["problems"]:
        raise ValueError(f"{record['folder']} is damaged: {in_words(record['problems'])}")
    if not record["checked"]:
        raise ValueError(f"{record['folder']} carries no checksums to compare with")
    return {**record, "whole": True}
