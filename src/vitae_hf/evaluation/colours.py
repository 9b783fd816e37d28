# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A colour for each class, the same in every picture."""

import numpy as np
from matplotlib import colormaps


def class_colours(num_labels: int) -> np.ndarray:
    """A different colour for each class, `(num_labels, 3)` from 0 to 1; none is grey, the first 18 are far apart."""
    base = np.delete(colormaps["tab20"](range(20))[:, :3], [14, 15], axis=0)
    base = np.concatenate([base[::2], base[1::2]])
    shades = [base * shade for shade in np.linspace(1, 0.3, -(-num_labels // len(base)))]
    return np.concatenate(shades)[:num_labels]
