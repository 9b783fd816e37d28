"""Data sets of every form give the same samples, and bad ones are named or counted."""

import random
from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import REPOSITORY
from torch.utils.data import DataLoader

from vitae_hf.data import class_names, load_labelled_images
from vitae_hf.samples import IGNORED_LABEL, LabelledImages, RepeatedAugmentation, collate, decode


def pixels(picture: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture.resize((8, 8))).copy()).permute(2, 0, 1)


@pytest.fixture
def image_folder(tmp_path):
    """Twelve images in a folder for each of three classes; the sixth is cut short, the eighth is text."""
    for index in range(12):
        folder = tmp_path / "images" / "train" / "cdb"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:02}.png"
        PIL.Image.new("RGB", (20, 10), (20 * index, 0, 0)).save(path)
        if index == 5:
            path.write_bytes(path.read_bytes()[:40])
        elif index == 7:
            path.write_text("no picture")
    return tmp_path / "images"


def test_a_folder_of_parquet_files_is_read_with_its_class_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    splits = load_labelled_images(str(REPOSITORY / "examples" / "fashion_mnist_mini"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6000, "test": 1000}
    assert class_names(splits)[9] == "Ankle boot"
    sample = LabelledImages(splits["test"], pixels)[6]
    assert sample["labels"] == 7 and sample["pixel_values"].shape == (3, 8, 8)
    assert decode(splits["test"][6]).mode == "RGB"


def test_a_bad_picture_is_an_error_that_names_its_file(image_folder):
    splits = load_labelled_images(str(image_folder))
    assert class_names(splits) == {0: "b", 1: "c", 2: "d"}
    dataset = LabelledImages(splits["train"], pixels)
    with pytest.raises(ValueError, match="cannot read .*/05.png"):
        [dataset[index] for index in range(12)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_counted_and_replaced_in_training(image_folder, workers):
    dataset = LabelledImages(load_labelled_images(str(image_folder))["train"], pixels, on_bad_sample="skip")
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 4] and dataset.skipped == 2


def test_bad_pictures_are_blank_and_unlabelled_in_evaluation(image_folder):
    split = load_labelled_images(str(image_folder))["train"]
    dataset = LabelledImages(split, pixels, on_bad_sample="skip", drop_bad=True)
    batches = list(DataLoader(dataset, batch_size=12, collate_fn=collate))
    assert len(batches[0]["labels"]) == 12 and dataset.skipped == 2
    good = batches[0]["labels"] != IGNORED_LABEL
    reds = sorted(batches[0]["pixel_values"][good][:, 0, 0, 0].tolist())
    assert reds == [20 * index for index in range(12) if index not in (5, 7)]  # each once, and no other
    assert not batches[0]["pixel_values"][~good].any()


def test_an_error_of_the_transform_is_never_taken_for_a_bad_picture(image_folder):
    def broken(picture):
        raise ValueError("a bug")

    dataset = LabelledImages(load_labelled_images(str(image_folder))["train"], broken, on_bad_sample="skip")
    with pytest.raises(ValueError, match="a bug"):
        dataset[0]


def test_random_transforms_depend_on_seed_epoch_and_sample_alone(image_folder):
    def draw(picture):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])

    split = load_labelled_images(str(image_folder))["train"]
    first, second = LabelledImages(split, draw, seed=1), LabelledImages(split, draw, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = first[2]["pixel_values"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(second[2]["pixel_values"], one) and not torch.equal(second[3]["pixel_values"], one)
    assert not torch.equal(LabelledImages(split, draw, seed=2)[2]["pixel_values"], one)
    first.set_epoch(1)
    assert not torch.equal(first[2]["pixel_values"], one)
    loader = DataLoader(second, batch_size=1, collate_fn=collate, num_workers=1, sampler=[2], persistent_workers=True)
    assert torch.equal(next(iter(loader))["pixel_values"][0], one)
    second.set_epoch(1)  # reaches workers that are running
    assert torch.equal(next(iter(loader))["pixel_values"][0], first[2]["pixel_values"])


def test_a_missing_label_is_named(image_folder):
    row = load_labelled_images(str(image_folder))["train"][0]
    with pytest.raises(ValueError, match="has no label"):
        decode({**row, "label": -1})


def test_a_batch_or_split_without_any_picture_is_named(image_folder):
    with pytest.raises(ValueError, match="every picture of this batch was skipped"):
        collate([None, None])
    split = load_labelled_images(str(image_folder))["train"]
    bad = split.filter(lambda row: row["image"]["path"].endswith(("05.png", "07.png")))
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        LabelledImages(bad, pixels, on_bad_sample="skip")[0]


def test_a_data_set_without_labels_lists_its_columns(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="one column for the labels, got \\[\\]"):
        load_labelled_images(str(tmp_path))


def test_repeated_augmentation_puts_a_picture_into_its_batch_as_other_pictures(image_folder):
    split = load_labelled_images(str(image_folder))["train"].select([0, 2, 3, 4, 5, 6])
    dataset = LabelledImages(split, lambda picture: torch.rand(1), seed=3)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(DataLoader(dataset, 3, sampler=RepeatedAugmentation(dataset, 3), collate_fn=collate))
        assert [len(set(batch["samples"])) for batch in batches] == [1, 1]  # one picture a batch
        assert all(len(set(batch["pixel_values"].flatten().tolist())) == 3 for batch in batches)
        epochs.append([batch["samples"][0] for batch in batches])
    assert epochs[0] != epochs[1] and len(set(epochs[0])) == 2


def test_a_part_of_the_splits_keeps_the_class_names_of_the_whole(tmp_path, monkeypatch):
    """Parquet of other tools has numbers for labels; their names are in the metadata of the data set's card."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    buffer = BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "png")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 2, "label": [1, 0]}
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{split}.parquet")
    names = "dtype: {class_label: {names: {'0': cat, '1': dog}}}"
    features = f"dataset_info: {{features: [{{name: image, dtype: image}}, {{name: label, {names}}}]}}"
    (tmp_path / "README.md").write_text(f"---\n{features}\n---\n")
    splits = load_labelled_images(str(tmp_path), splits=["test"])
    assert list(splits) == ["test"] and class_names(splits) == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": None, "label": 0}, "row 7 has no picture"),
        ({"image": {"bytes": None, "path": None}, "label": 0}, "row 7 has no picture"),
        ({"image": {"bytes": b"x", "path": "a.png"}, "label": None}, "a.png has no label"),
        ({"image": {"bytes": b"x", "path": None}, "label": 1}, "cannot read row 7: cannot identify"),
    ],
)
def test_whatever_is_missing_in_a_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        decode(row, name="row 7")
