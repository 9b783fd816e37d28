# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""`python -m vitae_hf COMMAND …` is `vitae COMMAND …`, for torchrun, accelerate and Slurm."""

from vitae_cli import main


if __name__ == "__main__":
    main()
