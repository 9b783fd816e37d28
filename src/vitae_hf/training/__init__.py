# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Training: one life of a run for every task, its arguments, the trainer, and what surrounds its updates."""
