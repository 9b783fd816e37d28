"""The recipe's augmentation is timm's, and what runs on the device does to a batch what it says."""

import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import torch
from helpers import ASSETS, pyramid_config
from timm.data import Mixup
from transformers import set_seed

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessorPil
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss, training_transform


CHELSEA = PIL.Image.open(ASSETS / "chelsea.png").convert("RGB")
PLAIN = {"erasing_prob": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = ViTAEImageProcessorPil(size=64, do_rescale=False, do_normalize=False)([CHELSEA], return_tensors="pt")
    uint8 = pixels.pixel_values.to(torch.uint8).repeat(size, 1, 1, 1)
    return uint8 + torch.arange(size, dtype=torch.uint8)[:, None, None, None], torch.arange(size) % 5


def test_workers_give_small_random_repeatable_pictures():
    transform = training_transform((64, 96), AugmentationArguments())

    def draw(seed: int) -> torch.Tensor:
        set_seed(seed)
        return transform(CHELSEA)

    assert draw(0).shape == (3, 64, 96) and draw(0).dtype == torch.uint8
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_no_draw_of_the_policy_fails():
    """timm's posterize asks this Pillow for 0 bits now and then."""
    transform, small = training_transform(32, AugmentationArguments()), CHELSEA.resize((40, 40))
    set_seed(0)
    assert all(transform(small).shape == (3, 32, 32) for _ in range(1500))


def test_the_policy_is_the_recipes():
    text = str(training_transform(224, AugmentationArguments()))
    assert text.count("AugmentOp") == 15 and "m=9, mstd=0.5" in text and "PosterizeIncreasing" in text
    assert "scale=(0.08, 1.0)" in text and "bilinear bicubic" in text and "ColorJitter" not in text
    assert "ColorJitter" in str(training_transform(224, AugmentationArguments(auto_augment=None)))


def test_normalisation_on_the_device_equals_the_image_processors():
    pixels, _ = DeviceAugmentation(5, AugmentationArguments(**PLAIN))(*batch(1))
    expected = ViTAEImageProcessorPil(size=64)(CHELSEA, return_tensors="pt").pixel_values
    assert torch.allclose(pixels, expected, atol=1e-5)


def test_mixing_equals_timms_with_the_same_draws():
    options = {**PLAIN, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
    augment, reference = DeviceAugmentation(5, AugmentationArguments(**options)), Mixup(0.8, 1.0, num_classes=5)
    plain = DeviceAugmentation(5, AugmentationArguments(**PLAIN))
    mixed_labels = 0
    for seed in range(20):
        np.random.seed(seed)
        pixels, targets = augment(*batch())
        np.random.seed(seed)
        expected_pixels, expected_targets = reference(plain(*batch())[0], batch()[1])
        assert torch.equal(pixels, expected_pixels) and torch.equal(targets, expected_targets)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        mixed_labels += int(((targets > 0.1).sum(1) == 2).any())
    assert mixed_labels > 10


def test_without_mixing_labels_are_smoothed():
    _, targets = DeviceAugmentation(5, AugmentationArguments(**{**PLAIN, "label_smoothing": 0.1}))(*batch(3))
    assert torch.allclose(targets[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))


def test_a_quarter_of_the_images_is_erased_with_noise():
    set_seed(0)
    random.seed(0)
    plain = DeviceAugmentation(5, AugmentationArguments(**PLAIN))(*batch(200))[0]
    erased = DeviceAugmentation(5, AugmentationArguments(**{**PLAIN, "erasing_prob": 0.25}))(*batch(200))[0]
    changed = (plain != erased).any(1).float().mean((1, 2))  # share of each image's pixels
    assert 0.15 < (changed > 0).float().mean() < 0.35
    assert changed.max() <= 0.36 and erased[plain != erased].std() > 0.8


def test_the_last_image_of_an_odd_batch_is_not_mixed():
    pixels, labels = batch(5)
    plain, targets = DeviceAugmentation(5, AugmentationArguments(erasing_prob=0, mixup_alpha=0, cutmix_alpha=0))(
        pixels, labels
    )
    for count in (5, 1):
        mixed, soft = DeviceAugmentation(5, AugmentationArguments(erasing_prob=0))(pixels[:count], labels[:count])
        assert torch.equal(mixed[-1], plain[count - 1]) and torch.equal(soft[-1], targets[count - 1])
    mixed, soft = DeviceAugmentation(5, AugmentationArguments(erasing_prob=0))(pixels, labels)
    assert all(not torch.equal(mixed[index], plain[index]) for index in (0, 1, 3))


def test_the_loss_equals_torchs_for_both_kinds_of_labels():
    outputs, labels = SimpleNamespace(logits=torch.randn(6, 5)), torch.arange(6) % 5
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
    assert torch.allclose(soft_target_loss(outputs, labels), expected)
    assert torch.allclose(soft_target_loss(outputs, torch.nn.functional.one_hot(labels, 5).float()), expected)


def test_accumulated_gradients_equal_the_large_batchs_with_frozen_statistics():
    model = ViTAEForImageClassification(pyramid_config()).eval()  # statistics frozen, nothing dropped
    pixels, targets = DeviceAugmentation(5, AugmentationArguments())(*batch(8))

    def gradients(sizes: list[int]) -> torch.Tensor:
        model.zero_grad()
        for images, soft in zip(pixels.split(sizes), targets.split(sizes)):
            soft_target_loss(model(images), soft, num_items_in_batch=8).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradients([8])
    assert torch.allclose(gradients([4, 4]), whole, atol=1e-6) and torch.allclose(gradients([6, 2]), whole, atol=1e-6)
