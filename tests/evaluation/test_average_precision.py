"""COCO's average precision, by hand: ranked boxes, crowds, sizes, masks that differ from their boxes."""

import numpy as np
import pytest

from vitae_hf.evaluation.average_precision import MeanAveragePrecision, run_lengths


BOXES = [[10, 10, 50, 50], [60, 60, 100, 100], [110, 10, 150, 50]]


def truth(*indices: int, **more) -> dict:
    return {"boxes": [BOXES[index] for index in indices], "labels": [0] * len(indices), **more}


def found(*indices: int, scores=None, **more) -> dict:
    return {**truth(*indices), "scores": scores or [0.9 - 0.1 * place for place in range(len(indices))], **more}


def test_a_wrong_box_costs_what_stands_behind_it():
    """Right, wrong, right: precision 1 up to a recall of a third, 2/3 up to two thirds, then nothing."""
    metric = MeanAveragePrecision(["garment"])
    boxes = found(0, 0, 1)
    boxes["boxes"][1] = [200, 200, 240, 240]
    metric.add(prediction=boxes, reference=truth(0, 1, 2))
    figures = metric.compute()
    at_101_recalls = (34 * 1.0 + 33 * 2 / 3) / 101
    assert figures["map"] == pytest.approx(100 * at_101_recalls) == figures["ap"]["garment"]
    assert figures["mar_100"] == pytest.approx(100 * 2 / 3) and figures["mar_1"] == pytest.approx(100 / 3)


def test_a_box_counts_up_to_the_overlap_that_it_has():
    """An overlap of 0.8 passes seven of the ten thresholds, 0.5 to 0.8."""
    boxes = found(0)
    boxes["boxes"][0] = [10, 10, 50, 42]
    figures = MeanAveragePrecision(["garment"]).compute(predictions=[boxes], references=[truth(0)])
    assert figures["map"] == pytest.approx(70) and figures["map_50"] == figures["map_75"] == 100


def test_boxes_inside_a_crowd_are_neither_right_nor_wrong():
    metric = MeanAveragePrecision(["garment"])
    crowd = truth(0, 1, is_crowd=[False, True])
    crowd["boxes"][1] = [60, 60, 140, 140]
    inside = found(1, 1, 0)
    inside["boxes"][1] = [100, 100, 140, 140]
    metric.add(prediction=inside, reference=crowd)
    assert metric.compute()["map"] == 100


def test_areas_decide_which_objects_are_small_and_what_is_unknown_is_none():
    metric = MeanAveragePrecision(["garment", "other"])
    metric.add(prediction=found(0), reference=truth(0, 1, areas=[500, 5000]))
    figures = metric.compute()
    assert figures["map_small"] == 100 and figures["map_medium"] == 0 and figures["map_large"] is None
    assert figures["ap"]["other"] is None and figures["map"] == pytest.approx(100 * 51 / 101)


def test_masks_are_measured_beside_boxes():
    whole = np.zeros((1, 120, 160), np.uint8)
    whole[0, 10:50, 10:50] = 1
    half = whole.copy()
    half[0, 10:26] = 0  # 0.6 of the pixels, in a box that is said to be the same
    metric = MeanAveragePrecision(["garment"], with_masks=True)
    metric.add(prediction=found(0, masks=run_lengths(half)), reference=truth(0, masks=whole))
    figures = metric.compute()
    assert figures["map"] == 100 and figures["mask_map"] == pytest.approx(30)


def test_a_mask_is_as_small_as_its_pixels_are_few_whatever_its_box():
    """A wrong mask of 100 pixels costs precision among small objects, also in a box that is large."""
    masks = np.zeros((2, 200, 200), np.uint8)
    masks[0, 10:30, 10:30] = masks[1, 100:110, 100:110] = 1
    metric = MeanAveragePrecision(["garment"], with_masks=True)
    prediction = {"boxes": [[10, 10, 30, 30], [0, 0, 200, 200]], "scores": [0.5, 0.9], "labels": [0, 0], "masks": masks}
    metric.add(prediction=prediction, reference=truth(0, masks=masks[:1], areas=[400]))
    assert metric.compute()["mask_map_small"] == 50
    wide = {"boxes": [[0, 0, 200, 200]], "labels": [0], "masks": masks[:1]}  # without an area it is the mask's as well
    metric.add(prediction={**wide, "scores": [0.9]}, reference=wide)
    figures = metric.compute()
    assert figures["mask_map_small"] == figures["map_small"] == 100 and figures["mask_map_large"] is None


def test_pictures_without_objects_or_boxes_count_and_no_picture_is_an_error():
    metric = MeanAveragePrecision(["garment"])
    metric.add(prediction=found(), reference=truth(0))
    assert metric.compute()["map"] == 0
    metric.add(prediction=found(0, scores=[0.9]), reference=truth())
    metric.add(prediction=found(0, scores=[0.8]), reference=truth(0))
    assert metric.compute()["map"] == 50
    with pytest.raises(ValueError, match="no picture to measure"):
        metric.compute()


def test_what_does_not_fit_is_refused_and_not_left_out():
    boxes = [[10, 10, 30, 30], [50, 50, 60, 70]]
    found = {"boxes": boxes, "scores": [0.9, 0.8], "labels": [0, 1]}
    reference = {"boxes": boxes, "labels": [0, 1]}
    for prediction, truth, message in (
        (found, {**reference, "labels": [1, 2]}, r"labels must be from 0 to 1, got \[2\]"),
        ({**found, "labels": [0, 7]}, reference, r"labels must be from 0 to 1, got \[7\]"),
        ({**found, "scores": [0.9]}, reference, "argument 2 is shorter"),
        ({**found, "labels": [0]}, reference, "argument 2 is longer"),
    ):
        with pytest.raises(ValueError, match=message):
            MeanAveragePrecision(["cat", "dog"]).add(prediction=prediction, reference=truth)


def test_masks_are_arrays_in_a_list_too_and_of_zeros_and_ones():
    masks = np.zeros((2, 8, 8))
    masks[:, 2:5, 3:6] = 1
    assert run_lengths(list(masks)) == run_lengths(masks.astype(bool))
    with pytest.raises(ValueError, match="masks must be 0 or 1 at each pixel, got values from 0.0 to 0.7"):
        run_lengths(0.7 * masks)
