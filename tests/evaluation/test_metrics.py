"""Metrics are local `evaluate` modules, equal to the obvious computation."""

import numpy as np
import pytest
import torch

from vitae_hf.evaluation.metrics import MeanIoU, ReaLAccuracy, TopKAccuracy


def test_top_k_equals_torchs(seeded):
    scores, labels = torch.randn(200, 20), torch.randint(0, 20, (200,))
    result = TopKAccuracy().compute(predictions=scores.numpy(), references=labels.numpy(), ks=(1, 3, 5))
    for k in (1, 3, 5):
        expected = 100 * (scores.topk(k).indices == labels[:, None]).any(1).double().mean().item()
        assert result[f"top{k}"] == pytest.approx(expected)


def test_batches_add_up_to_the_whole():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(90, 7)).astype(np.float32), generator.integers(0, 7, 90)
    metric = TopKAccuracy()
    for start in range(0, 90, 25):
        metric.add_batch(predictions=scores[start : start + 25], references=labels[start : start + 25])
    assert metric.compute() == TopKAccuracy().compute(predictions=scores, references=labels)


def test_equal_scores_are_no_free_hit():
    """A network that gives all classes one score is right for class 0 alone."""
    scores = np.zeros((4, 4), np.float32)
    assert TopKAccuracy().compute(predictions=scores, references=[0, 1, 2, 3], ks=(1, 2)) == {
        "top1": 25.0,
        "top2": 50.0,
    }


def test_a_label_beyond_the_classes_is_named():
    with pytest.raises(ValueError, match="from 0 to 2, as there are 3 classes; got 1 to 3"):
        TopKAccuracy().compute(predictions=np.zeros((2, 3)), references=[1, 3])


def test_real_counts_images_that_have_labels():
    result = ReaLAccuracy().compute(predictions=[3, 1, 2, 5], references=[[3, 4], [0], [], [5]])
    assert result == {"real": pytest.approx(200 / 3), "images": 3}


def test_scores_that_are_no_numbers_have_no_accuracy():
    with pytest.raises(ValueError, match="the scores of 1 of 2 images are not finite"):
        TopKAccuracy().compute(predictions=[[0.1, float("nan")], [0.2, 0.8]], references=[0, 1], ks=(1,))


def plain_iou(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> list[float | None]:
    counted = references != 255
    ious = []
    for index in range(num_classes):
        predicted, true = (predictions == index) & counted, (references == index) & counted
        union = (predicted | true).sum()
        ious.append(100 * (predicted & true).sum() / union if union else None)
    return ious


def test_mean_iou_over_batches_is_that_of_all_pixels_without_ignored_pixels_and_absent_classes():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 4, (6, 9, 7))  # class 4 is predicted only, class 5 nowhere
    predictions = np.where(generator.random(references.shape) < 0.6, references, generator.integers(0, 5, (6, 9, 7)))
    references[generator.random(references.shape) < 0.2] = 255
    metric = MeanIoU([*"abcdef"])
    for start in (0, 4):
        metric.add_batch(predictions=predictions[start : start + 4], references=references[start : start + 4])
    figures = metric.compute()
    expected = plain_iou(predictions, references, 6)
    *present, absent = figures["iou"].values()
    assert present == pytest.approx(expected[:5]) and absent is expected[5] is None
    assert figures["mean_iou"] == pytest.approx(np.mean(expected[:5])) and expected[4] == 0
    counted = references != 255
    assert figures["pixel_accuracy"] == pytest.approx(100 * (predictions == references)[counted].mean())
    recall = [(predictions == index)[counted & (references == index)].mean() for index in range(4)]
    assert figures["mean_accuracy"] == pytest.approx(100 * np.mean(recall))
    most_frequent = np.full_like(references, np.bincount(references[counted]).argmax())
    constant = [iou for iou in plain_iou(most_frequent, references, 6) if iou is not None]
    assert figures["constant_mean_iou"] == pytest.approx(np.mean(constant))
    again = metric.compute(predictions=references[:1] % 255 % 6, references=references[:1])
    assert again["mean_iou"] == 100  # `compute` begins anew


def test_mean_iou_says_what_is_wrong():
    metric = MeanIoU(["sky", "sea"])
    with pytest.raises(ValueError, match=r"predictions \(2, 2\) and masks \(2, 3\) must have one shape"):
        metric.add_batch(predictions=np.zeros((2, 2)), references=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="masks must be from 0 to 1, as there are 2 classes, .* got 0 to 2"):
        metric.add_batch(predictions=[0, 0], references=[0, 2])
    metric.add_batch(predictions=[0, 1], references=[255, -100])
    with pytest.raises(ValueError, match="no pixel that counts"):
        metric.compute()


def test_a_class_is_not_ignored():
    with pytest.raises(ValueError, match="255 is a class of 300 and among `ignored`"):
        MeanIoU([str(number) for number in range(300)])
