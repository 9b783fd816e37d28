# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Is this model whole? Compares every file with its checksum; a flipped byte of weights loads without a word otherwise.

    python scripts/verify_checkpoint.py org/vitae-s

The checksums are those of `SHA256SUMS`, which published folders carry, and, for a name, the Hub's own. If a file is
damaged or missing it is named, and the exit status is 1.
"""

import argparse
import json
import sys

from vitae_hf.checksums import verify_checkpoint
from vitae_hf.publishing import HUB_ERRORS, describe, plain_words


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, or name of a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    arguments = parser.parse_args(argv)
    try:
        record = verify_checkpoint(arguments.source, arguments.revision)
    except HUB_ERRORS as error:
        print(f"error: {plain_words(error, arguments.source)}", file=sys.stderr)
        sys.exit(1)
    if not record["checked"] and not record["problems"]:
        record["problems"] = {arguments.source: ["no checksums to compare with"]}
    if record["problems"]:
        print(f"error: in {record['folder']} — {describe(record['problems'])}", file=sys.stderr)
        sys.exit(1)
    return {**record, "whole": True}


if __name__ == "__main__":
    print(json.dumps(main()))
