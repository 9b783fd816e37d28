# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `vitae detect`, from a checkout."""

import sys

from vitae_cli import main


if __name__ == "__main__":
    main(["detect", *sys.argv[1:]])
