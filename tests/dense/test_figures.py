"""Overlays of masks on pictures."""

import numpy as np
import PIL.Image

from vitae_hf.dense.segmentation.figures import draw_overlays
from vitae_hf.evaluation.colours import class_colours


def test_overlays_tell_many_classes_apart_and_show_what_is_ignored():
    colours = class_colours(150)
    assert len(np.unique(colours.round(6), axis=0)) == 150 and np.ptp(colours, axis=1).min() > 0.01
    mask = np.full((20, 30), 255, np.uint8)
    mask[:10] = 3
    figure = draw_overlays(
        [(PIL.Image.new("RGB", (30, 20), "white"), mask, np.zeros_like(mask))], ["background", *"abcd"], ""
    )
    truth, prediction = (axis.images[0].get_array() for axis in figure.axes[1:3])
    assert np.allclose(truth[15], 0.35) and np.allclose(prediction, 1)  # ignored is dark, the background as it is
    assert np.allclose(truth[5, 0], 0.35 + 0.65 * class_colours(5)[3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["c"]
