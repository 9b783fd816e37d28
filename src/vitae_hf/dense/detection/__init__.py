# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Detection and instance segmentation on ViTAE backbones: data with boxes, transforms, detectors, their trainer."""
