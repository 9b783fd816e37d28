# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Names that others chose, drawn as they are."""

from matplotlib import rc_context


plain_text = rc_context({"text.parse_math": False})
"""Decorates a function that draws: matplotlib would take what lies between two dollars of a name for a formula."""
