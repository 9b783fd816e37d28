"""Pictures, boxes and masks are augmented together, resized as the image processor does, and put into batches."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors

from vitae_hf.dense.detection.data import DetectionDataset, collate_objects, load_boxed_images
from vitae_hf.dense.detection.models import make_processor, training_inputs
from vitae_hf.dense.detection.objects import read_objects
from vitae_hf.dense.detection.transforms import (
    BoxAugmentationArguments,
    CropOfRandomSize,
    ObjectTransform,
    evaluation_transform,
    keep_visible,
)
from vitae_hf.evaluation.average_precision import run_lengths


HEIGHT, WIDTH = 80, 120
BOXES = [[10, 10, 40, 30], [70, 40, 30, 36]]  # a red one and a green one, on black


def picture_and_objects():
    pixels, masks = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((2, HEIGHT, WIDTH), np.uint8)
    for number, (left, top, width, height) in enumerate(BOXES):
        masks[number, top : top + height, left : left + width] = 1
        pixels[masks[number] > 0, number] = 255
    codes = [{**code, "counts": code["counts"].decode()} for code in run_lengths(masks)]
    objects, problems = read_objects(
        {"bbox": BOXES, "category": [0, 1], "segmentation": codes}, 2, HEIGHT, WIDTH, with_masks=True
    )
    assert problems == []
    return PIL.Image.fromarray(pixels), objects


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_size": [64, 96], "crop_prob": 1.0, "zoom_out_prob": 0.0},
        {"image_size": [64], "crop_prob": 0.5, "zoom_out_prob": 0.5},
        {"short_sides": [48, 64], "long_side": 100, "crop_prob": 1.0},
    ],
    ids=["stretched", "zoomed out", "own shape"],
)
def test_boxes_and_masks_stay_with_their_objects(arguments):
    """In a picture in which each object has a colour of its own, wherever it is cropped, moved or mirrored to."""
    transform = ObjectTransform(BoxAugmentationArguments(**arguments))
    seen, sizes = set(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, labels = transform(*picture_and_objects())
        sizes.add(tuple(pixels.shape[1:]))
        pixels = pixels * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        pixels += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        for box, label, mask in zip(labels["boxes"], labels["class_labels"].tolist(), labels["masks"]):
            coloured = (pixels[label] > 0.7) & (pixels[1 - label] < 0.3) & (pixels[2] < 0.3)
            apart = (coloured ^ (mask > 0)).sum()
            rows, columns = coloured.any(1).nonzero(), coloured.any(0).nonzero()
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            edge = 4 * (box[2:] - box[:2]).sum()  # two pixels wide, where colours blend
            assert apart < edge and (box - around).abs().max() < 3
            seen.add((label, box[0].item() > pixels.shape[2] / 2))
    assert len(seen) == 4  # each of them on both sides
    if "image_size" in arguments:
        assert sizes == {(arguments["image_size"][0], arguments["image_size"][-1])}
    else:
        assert len(sizes) > 3 and {min(size) for size in sizes} <= {48, 64}


def test_an_object_of_whose_box_or_mask_a_crop_has_left_nothing_is_gone():
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 0.5, 8]])
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, 2, 2] = masks[2, 0, 0] = 1
    kept = keep_visible({"pixel_values": masks, "boxes": boxes, "class_labels": torch.arange(3), "masks": masks})
    assert kept["class_labels"].tolist() == [0] and torch.equal(kept["masks"], masks[:1]) and len(kept["boxes"]) == 1


def test_a_crop_of_random_size_lies_inside_the_picture():
    crop, sides = CropOfRandomSize(30, 50), set()
    for seed in range(30):
        torch.manual_seed(seed)
        cropped = crop(tv_tensors.Image(torch.ones(3, 40, 120)))
        assert cropped.all()
        sides.add(tuple(cropped.shape[1:]))
    assert {height for height, _ in sides} <= set(range(30, 41)) and len(sides) > 20
    assert max(width for _, width in sides) > 45


def test_training_without_a_crop_sees_what_the_image_processor_makes():
    for arguments in ({"image_size": [64, 96]}, {"short_sides": [64], "long_side": 1000}):
        arguments = BoxAugmentationArguments(crop_prob=0.0, flip_prob=0.0, **arguments)
        picture, objects = picture_and_objects()
        pixels, labels = ObjectTransform(arguments)(picture, objects)
        processor = make_processor("mask_rcnn", arguments.processor_size)
        expected, sizes = evaluation_transform(processor)(picture, objects)
        assert sizes["size"].tolist() == [HEIGHT, WIDTH] and (pixels - expected).abs().max() < 0.1
        scale = torch.tensor([expected.shape[2] / WIDTH, expected.shape[1] / HEIGHT] * 2)
        torch.testing.assert_close(labels["boxes"], torch.tensor(objects.boxes) * scale)


def test_draws_depend_on_seed_epoch_and_picture_alone():
    data, names = load_boxed_images("examples/garment_scenes")
    transform = ObjectTransform(BoxAugmentationArguments(image_size=[64], distortion_prob=0.5))
    data = DetectionDataset(data["validation"], transform, names, seed=1)
    first = data[0]["pixel_values"]
    torch.rand(3)
    assert torch.equal(data[0]["pixel_values"], first)
    data.set_epoch(1)
    assert not torch.equal(data[0]["pixel_values"], first)


def test_a_batch_is_filled_up_and_boxes_are_shares_of_their_own_picture():
    samples = []
    for height, width in ((40, 60), (50, 33)):
        boxes, masks = torch.tensor([[0.0, 10, width / 2, height]]), torch.ones(1, height, width)
        labels = {"boxes": boxes, "class_labels": torch.tensor([1]), "masks": masks}
        samples.append({"pixel_values": torch.ones(3, height, width), "labels": labels, "rows": 0, "names": "x"})
    batch = collate_objects(samples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_mask"].sum((1, 2)).tolist() == [2400, 1650]
    inputs = training_inputs(batch)
    for label, height in zip(inputs["labels"], (40, 50)):
        expected = torch.tensor([[0.25, (10 + height) / 2 / height, 0.5, (height - 10) / height]])
        torch.testing.assert_close(label["boxes"], expected)
        assert label["masks"].shape == (1, 64, 64)
    assert [label["masks"].sum().item() for label in inputs["labels"]] == [2400, 1650]
    same = collate_objects(samples[:1] * 2)
    assert same["pixel_values"].shape == (2, 3, 40, 60) and same["pixel_mask"].all()
