"""Pictures and their masks: read, checked with what is wrong named, and augmented together."""

import io
import json

import build_garment_scenes
import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
from dense_networks import masked_rows
from torchvision import tv_tensors

from vitae_hf.dense.segmentation.data import SegmentationDataset, load_masked_images, mask_class_names
from vitae_hf.dense.segmentation.transforms import (
    ColourDistortion,
    MaskAugmentationArguments,
    VariedCrop,
    segmentation_transform,
)


def test_the_shipped_scenes_are_what_the_script_renders(scenes):
    split = datasets.load_dataset("parquet", data_files=str(build_garment_scenes.SOURCE / "test-*.parquet"))["train"]
    generator = np.random.default_rng([0, 1])
    for row in scenes["validation"].select(range(3)):
        rendered = build_garment_scenes.render_scene(generator, split)
        assert rendered["objects"] == row["objects"]
        masks = [PIL.Image.open(io.BytesIO(mask["bytes"])) for mask in (rendered["mask"], row["mask"])]
        assert np.array_equal(*map(np.asarray, masks))
    assert mask_class_names(scenes)[0] == "background" and len(mask_class_names(scenes)) == 11


def test_pictures_and_masks_are_augmented_together():
    """In a picture that is its mask, they stay the same: scaled, cropped, filled up and mirrored alike."""
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (6, 9)), np.ones((10, 10))).astype(np.uint8)
    split = masked_rows((np.repeat(100 * mask[..., None], 3, -1), mask))
    arguments = MaskAugmentationArguments(short_side=60, crop_size=64, max_class_share=0.6, distortion_prob=0)
    data = SegmentationDataset(split, segmentation_transform(arguments), num_labels=3, seed=0)
    drawn = []
    for epoch in range(8):
        data.set_epoch(epoch)
        sample = data[0]
        drawn.append(sample["labels"])
        assert torch.equal(sample["labels"], data[0]["labels"]) and sample["labels"].shape == (64, 64)
        red = (sample["pixel_values"][0] * 0.229 + 0.485) * 255
        known = sample["labels"] != 255
        agreement = ((red / 100 - sample["labels"]).abs() < 0.5)[known].double().mean()
        assert agreement > 0.85  # but where colours blend at edges
        assert (sample["labels"][known].bincount() / known.sum()).max() <= 0.6
    assert any((labels == 255).any() for labels in drawn) and not torch.equal(drawn[0], drawn[1])


def test_a_crop_with_too_much_of_one_class_is_drawn_again():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 20:32] = 1
    crop = VariedCrop(16, max_class_share=0.75, fill=(0, 0, 0))
    crops = [crop(tv_tensors.Image(torch.zeros(3, 40, 40)), tv_tensors.Mask(mask))[1] for _ in range(40)]
    varied = [0.25 <= labels.double().mean() <= 0.75 for labels in crops]
    assert sum(varied) >= 38  # ten draws; less than half of them would be


def test_a_crop_of_one_class_alone_is_taken_when_there_is_no_other():
    split = masked_rows((np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), np.uint8)))
    transform = segmentation_transform(MaskAugmentationArguments(short_side=40, crop_size=16))
    assert (SegmentationDataset(split, transform, num_labels=2)[0]["labels"] == 1).all()


def test_colours_are_distorted_but_not_exchanged():
    red = tv_tensors.Image(torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    distorted = [ColourDistortion(p=1.0)(red).float().mean((1, 2)) for _ in range(50)]
    assert all(colour.argmax() == 0 for colour in distorted) and len({tuple(c.tolist()) for c in distorted}) > 40


def test_a_picture_that_is_stored_turned_is_refused_since_its_mask_is_not():
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 3
    turned = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(turned, "JPEG", exif=exif)
    mask = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(mask, "PNG")
    rows = [{"image": {"bytes": turned.getvalue(), "path": None}, "mask": {"bytes": mask.getvalue(), "path": None}}]
    with pytest.raises(ValueError, match="row 0: its EXIF orientation is 3.*save the picture upright"):
        SegmentationDataset(rows, None, num_labels=2).read(0)


def test_class_names_are_neither_empty_nor_there_twice(tmp_path):
    (tmp_path / "names.txt").write_text("wall\nsky\n\n")
    assert mask_class_names({}, tmp_path / "names.txt") == {0: "wall", 1: "sky"}
    (tmp_path / "names.txt").write_text("wall\n\nsky\nwall\n")
    with pytest.raises(ValueError, match="line 2 of .*names.txt must be the name of one more class, got ''"):
        mask_class_names({}, tmp_path / "names.txt")


def test_labels_are_reduced_as_in_ade20k_and_a_class_is_ignored():
    split = masked_rows((np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [3, 255]], np.uint8)))
    data = SegmentationDataset(split, None, num_labels=3, reduce_labels=True)
    assert data.read(0)[1].tolist() == [[255, 0], [2, 255]]
    data = SegmentationDataset(split, None, num_labels=2, reduce_labels=True, ignored_class=2)
    assert data.read(0)[1].tolist() == [[255, 0], [255, 255]]
    data = SegmentationDataset(split, None, num_labels=2, ignored_class=3)
    assert data.read(0)[1].tolist() == [[0, 1], [255, 255]]


def test_masks_of_one_class_and_of_what_is_ignored_are_refused_before_the_training():
    picture, black, white = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)
    two = masked_rows((picture, black), (picture, white))
    with pytest.raises(
        ValueError, match="the values 0 and 255 alone, and 255 is ignored: write 1 for the second class"
    ):
        SegmentationDataset(two, None, num_labels=2).check()
    for options in ({"num_labels": 1}, {"num_labels": 3}, {"num_labels": 2, "ignored_class": 1}):
        SegmentationDataset(two, None, **options).check()
    second = np.ones((2, 2), np.uint8)  # in a row that the first look passes over
    rows = [(picture, white), (picture, second), *[(picture, black)] * 60]
    SegmentationDataset(masked_rows(*rows), None, num_labels=2).check()


def test_bad_masks_are_named_with_what_was_expected():
    picture, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    too_high = mask.copy()
    too_high[0] = 7
    for bad, message in [
        (
            (picture, too_high),
            "mask of row 1 has the value 7, and 6 pixels .* there are 5 classes, counted from 0, and 255",
        ),
        ((picture, mask[:, :5]), "row 1 has 6×4 pixels, but its mask 5×4"),
        ((picture, picture), "the mask of row 1: a mask has one channel, a class at each pixel; this one is RGB"),
    ]:
        data = SegmentationDataset(masked_rows((picture, mask), bad), None, num_labels=5)
        with pytest.raises(ValueError, match=message):
            data.check()
    with pytest.raises(ValueError, match="there can be 255 classes at most, got 256"):
        SegmentationDataset(masked_rows((picture, mask)), None, num_labels=256)


@pytest.mark.parametrize("folders", [("train", "validation"), ("Training", "Val")])
def test_pictures_in_a_folder_with_metadata_are_read(tmp_path, folders):
    for split in folders:
        (tmp_path / split / "masks").mkdir(parents=True)
        PIL.Image.new("RGB", (4, 3)).save(tmp_path / split / "a.jpg")
        mask = PIL.Image.fromarray(np.array([[0, 1, 1, 255]] * 3, np.uint8))
        mask.putpalette(list(range(256)) * 3)  # indices count, not colours
        mask.save(tmp_path / split / "masks" / "a.png")
        row = {"file_name": "a.jpg", "mask_file_name": "masks/a.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    data = load_masked_images(str(tmp_path))
    assert set(data) == {"train", "validation"}
    assert SegmentationDataset(data["train"], None, num_labels=2).read(0)[1].tolist() == [[0, 1, 1, 255]] * 3


def test_of_several_columns_of_pictures_those_that_are_named_are_read(tmp_path):
    names = "image", "img", "mask", "label"
    pictures = [np.full((4, 4, 3), 10 * index, np.uint8) for index in range(2)]
    masks = [np.full((4, 4), index, np.uint8) for index in range(2)]
    row = {name: PIL.Image.fromarray(array) for name, array in zip(names, [*pictures, *masks])}
    features = datasets.Features(dict.fromkeys(names, datasets.Image()))
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")

    def read(**columns):
        picture, mask, _ = SegmentationDataset(load_masked_images(str(tmp_path), **columns)["train"], None, 11).read(0)
        return np.asarray(picture).max(), mask.max()

    assert read(image_column="img", mask_column="label") == (10, 1)
    assert read(image_column="image", mask_column="mask") == (0, 0)
    assert read(image_column="image", mask_column="label") == (0, 1)
    for columns, message in [
        ({}, r"several columns of images, \['image', 'img'\]: name one of them by --image_column_name"),
        ({"image_column": "img"}, r"several columns of masks, \['mask', 'label'\]: .* by --mask_column_name"),
        ({"image_column": "mask", "mask_column": "mask"}, "has no masks in a column 'mask'; it has .*'label'"),
        ({"image_column": "photo"}, "has no images in a column 'photo'; it has .*'img'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_masked_images(str(tmp_path), **columns)


def test_missing_columns_and_names_are_named(tmp_path):
    picture = PIL.Image.new("RGB", (4, 4))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list([{"image": picture, "label": 1}], features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"must have a column of masks, got .*'label': Value.*; one of pictures that is called mask, "
    ):
        load_masked_images(str(tmp_path))
    masked = masked_rows((np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)))
    masked.rename_column("mask", "annotation").to_parquet(tmp_path / "a.parquet")
    data = load_masked_images(str(tmp_path))
    assert list(data["train"].features) == ["image", "mask"]
    with pytest.raises(ValueError, match="give a file with the name of a class on each line"):
        mask_class_names(data)
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    assert mask_class_names(data, tmp_path / "names.txt") == {0: "sky", 1: "sea"}
