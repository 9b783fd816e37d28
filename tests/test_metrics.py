"""Metrics are local `evaluate` modules, equal to the obvious computation."""

import numpy as np
import pytest
import torch

from vitae_hf.metrics import ReaLAccuracy, TopKAccuracy


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
