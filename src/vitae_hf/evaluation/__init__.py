# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Figures and pictures of what a trained classifier does."""
