# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Labels and features of many pictures, each in one row, and what features are for: probes and search."""
