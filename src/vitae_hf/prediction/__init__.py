# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Labels and features of many pictures: from a list of sources to rows in a folder, each picture once."""
