# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Segmentation on ViTAE backbones: data with masks, transforms, UperNet, its trainer and figures."""
