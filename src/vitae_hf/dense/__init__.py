# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Detection and segmentation: data, models and training on ViTAE's backbones."""
