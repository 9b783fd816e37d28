# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Training: the arguments of a run, the trainer and what it keeps."""
