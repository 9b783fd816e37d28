# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Dense prediction on ViTAE backbones."""
