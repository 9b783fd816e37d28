# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A web page that shows what a classifier sees in a picture."""
