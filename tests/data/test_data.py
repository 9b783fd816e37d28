"""Data sets of every form give the same samples, and bad ones are named or counted."""

import random
from collections import Counter
from io import BytesIO

import datasets
import numpy as np
import pandas
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import DATA, write_several_columns
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from vitae_hf.commands.train import accuracy
from vitae_hf.data.pictures import decode
from vitae_hf.data.samples import IGNORED_LABEL, ImageDataset, RepeatedAugmentation, collate
from vitae_hf.data.shards import find_shards
from vitae_hf.data.sources import class_names, draw_by_class, hold_out, load_images, load_labelled_images


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
    splits = load_labelled_images(str(DATA))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6000, "test": 1000}
    assert class_names(splits)[9] == "Ankle boot"
    sample = ImageDataset(splits["test"], pixels)[6]
    assert sample["labels"] == 7 and sample["pixel_values"].shape == (3, 8, 8)
    assert decode(splits["test"][6]).mode == "RGB"


def test_a_bad_picture_is_an_error_that_names_its_file(image_folder):
    splits = load_labelled_images(str(image_folder))
    assert class_names(splits) == {0: "b", 1: "c", 2: "d"}
    dataset = ImageDataset(splits["train"], pixels)
    with pytest.raises(ValueError, match="cannot read .*/05.png"):
        [dataset[index] for index in range(12)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_counted_and_replaced_in_training(image_folder, workers):
    dataset = ImageDataset(load_labelled_images(str(image_folder))["train"], pixels, on_bad_sample="skip")
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 4] and dataset.skipped == 2


def test_bad_pictures_are_blank_and_unlabelled_in_evaluation(image_folder):
    split = load_labelled_images(str(image_folder))["train"]
    dataset = ImageDataset(split, pixels, on_bad_sample="skip", drop_bad=True)
    batches = list(DataLoader(dataset, batch_size=12, collate_fn=collate))
    assert len(batches[0]["labels"]) == 12 and dataset.skipped == 2
    good = batches[0]["labels"] != IGNORED_LABEL
    reds = sorted(batches[0]["pixel_values"][good][:, 0, 0, 0].tolist())
    assert reds == [20 * index for index in range(12) if index not in (5, 7)]  # each once, and no other
    assert not batches[0]["pixel_values"][~good].any()


def test_an_error_of_the_transform_is_never_taken_for_a_bad_picture(image_folder):
    def broken(picture):
        raise ValueError("a bug")

    dataset = ImageDataset(load_labelled_images(str(image_folder))["train"], broken, on_bad_sample="skip")
    with pytest.raises(ValueError, match="a bug"):
        dataset[0]


def test_random_transforms_depend_on_seed_epoch_and_sample_alone(image_folder):
    def draw(picture):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])

    split = load_labelled_images(str(image_folder))["train"]
    first, second = ImageDataset(split, draw, seed=1), ImageDataset(split, draw, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = first[2]["pixel_values"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(second[2]["pixel_values"], one) and not torch.equal(second[3]["pixel_values"], one)
    assert not torch.equal(ImageDataset(split, draw, seed=2)[2]["pixel_values"], one)
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


def numbered(folder, labels: list[int], names: list[str] | None = None) -> str:
    """A folder of pictures with labels that are numbers, whether the names of their classes are enough or not."""
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    rows = {"image": [PIL.Image.new("RGB", (9, 9))] * len(labels), "label": [0] * len(labels)}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-0.parquet")
    table = pyarrow.parquet.read_table(folder / "train-0.parquet")
    metadata, place = table.schema.metadata, table.schema.get_field_index("label")
    table = table.set_column(place, "label", pyarrow.array(labels, "int64")).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")
    return str(folder)


def test_a_label_beyond_the_names_of_classes_is_named(tmp_path):
    source = numbered(tmp_path, [0, 1, 0, 1, 5])
    assert load_labelled_images(source, names=list("abcdef"))["train"].features["label"].num_classes == 6
    with pytest.raises(ValueError, match="has the label 5, but 2 classes have names, counted from 0"):
        load_labelled_images(source, names=["a", "b"])
    source = numbered(tmp_path, [0, 1, 0, 1, 5], ["a", "b"])
    with pytest.raises(ValueError, match="names its classes itself, a, b: leave --class_names out"):
        load_labelled_images(source, names=["b", "a"])
    split = load_labelled_images(source)["train"]
    rest, held_out = hold_out(split, 0.4, seed=0)
    assert sorted(held_out["label"]) == [0, 1] and 5 in rest["label"]
    with pytest.raises(ValueError, match="row 4 has label 5, but there are 2 classes, counted from 0"):
        ImageDataset(split, pixels)[4]
    assert ImageDataset(split, pixels, on_bad_sample="skip")[4]["labels"] == 0


def test_the_folder_that_one_is_in_is_a_data_set(tmp_path, monkeypatch):
    numbered(tmp_path, [0, 1], ["a", "b"])
    monkeypatch.chdir(tmp_path)
    assert load_labelled_images(".")["train"]["label"][:] == [0, 1] and find_shards(".").rows == (2,)
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: one, data_files: train-0.parquet}]\n---\n")
    assert load_labelled_images(".")["train"]["label"][:] == load_labelled_images(".", "one")["train"]["label"][:]


def test_a_split_without_any_picture_is_named_and_a_batch_of_an_evaluation_may_have_none(image_folder):
    split = load_labelled_images(str(image_folder))["train"]
    bad = split.filter(lambda row: row["image"]["path"].endswith(("05.png", "07.png")))
    blank = collate(list(ImageDataset(bad, pixels, on_bad_sample="skip", drop_bad=True)))
    assert blank["labels"].tolist() == 2 * [IGNORED_LABEL] and not blank["pixel_values"].any()
    with pytest.raises(ValueError, match="none of the 2 pictures to evaluate can be read"):
        accuracy(EvalPrediction(np.zeros((2, 3)), blank["labels"].numpy()))
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        ImageDataset(bad, pixels, on_bad_sample="skip")[0]


def test_a_data_set_without_labels_lists_its_columns(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must have a column of labels, got .*; --label_column_name names a column of"):
        load_labelled_images(str(tmp_path))


def test_columns_are_named_where_there_are_several(tmp_path):
    numbers = write_several_columns(tmp_path)
    source = str(tmp_path)
    with pytest.raises(
        ValueError, match=r"several columns of images, \['picture', 'mask'\]: .* by --image_column_name"
    ):
        load_images(source)
    assert np.asarray(decode(load_images(source, image_column="mask")["train"][0])).max() == 1
    chosen = {"image_column": "picture"}
    with pytest.raises(ValueError, match=r"several columns of labels, \['fine', 'coarse'\]: .* by --label_column_name"):
        load_labelled_images(source, **chosen)
    with pytest.raises(ValueError, match="no labels in a column 'picture'"):
        load_labelled_images(source, label_column="picture", **chosen)
    for column, names, labels in (
        ("fine", numbers["fine"], [3, 0, 1]),
        ("coarse", numbers["coarse"], [1, 0, 0]),
        ("place", ["hill", "sea"], [1, 0, 1]),
    ):
        split = load_labelled_images(source, label_column=column, **chosen)["train"]
        assert (split["label"][:], split.features["label"].names) == (labels, names)
        shards = find_shards(source, label_column=column, **chosen)
        assert [row["label"] for row in shards.read(0, 0, 3)] == labels
        assert np.asarray(decode(split[0])).max() == 200 == np.asarray(decode(next(shards.read(0, 0, 1)))).max()


def test_repeated_augmentation_puts_a_picture_into_its_batch_as_other_pictures(image_folder):
    split = load_labelled_images(str(image_folder))["train"].select([0, 2, 3, 4, 5, 6])
    dataset = ImageDataset(split, lambda picture: torch.rand(1), seed=3)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(DataLoader(dataset, 3, sampler=RepeatedAugmentation(dataset, 3), collate_fn=collate))
        assert [len(set(batch["names"])) for batch in batches] == [1, 1]  # one picture a batch
        assert all(len(set(batch["pixel_values"].flatten().tolist())) == 3 for batch in batches)
        epochs.append([batch["names"][0] for batch in batches])
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


# -------------------------------------------------------------------------- folders as people have them


def write_pictures(*paths, colour=0):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def write_rows(path, labels, column="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
    pictures = [{"bytes": png(), "path": None} for _ in labels]
    datasets.Dataset.from_dict({"image": pictures, column: labels}, features).to_parquet(path)


def png() -> bytes:
    buffer = BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data"


def write_as(kind: str, folder):
    """Two pictures of two classes."""
    if kind == "classes":
        write_pictures(folder / "a" / "1.png", folder / "b" / "2.png")
    elif kind == "parquet":
        write_rows(folder / "0.parquet", ["a", "b"])
    else:
        write_pictures(folder / "1.png", folder / "2.png")
        (folder / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")


def test_a_split_without_the_metadata_that_others_have_is_named(own_cache):
    write_as("metadata", own_cache / "train")
    write_pictures(own_cache / "test" / "1.png")
    with pytest.raises(ValueError, match="test has no metadata.csv, .jsonl or .parquet, which others of"):
        load_labelled_images(str(own_cache))


@pytest.mark.parametrize("kind", ["classes", "parquet", "metadata"])
@pytest.mark.parametrize(
    "names",
    [
        {"Training": "train", "Testing": "test"},
        {"Train": "train", "Valid": "validation"},
        {"TRAIN": "train", "dev": "validation", "test": "test"},
        {"train2017": "train", "val2017": "validation"},
        {"ILSVRC_img_train": "train", "ILSVRC_img_eval": "validation"},
    ],
)
def test_splits_are_folders_by_the_usual_names_in_any_case(own_cache, kind, names, caplog):
    for name in names:
        write_as(kind, own_cache / "wrapper" / name)
    splits = load_labelled_images(str(own_cache))
    assert {name: len(split) for name, split in splits.items()} == dict.fromkeys(names.values(), 2)
    assert list(class_names(splits).values()) == ["a", "b"]
    assert sum(all(f"{name} is {split}" in line for name, split in names.items()) for line in caplog.messages) == 1
    assert {name: len(split) for name, split in load_images(str(own_cache)).items()} == dict.fromkeys(names.values(), 2)


@pytest.mark.parametrize("load", [load_labelled_images, load_images])
@pytest.mark.parametrize(
    "paths, message",
    [
        (
            ["train/a/1.png", "extra/a/1.png", "more/a/1.png"],
            "train, which are splits, beside extra, more, which are not",
        ),
        (["train/a/1.png", "1.png"], "train, which are splits, beside 1.png, which are not"),
        (["train/a/1.png", "val/a/1.png", "Dev/a/1.png"], "Dev, val, which are all called as the split 'validation'"),
        (["a/train/1.png", "a/test/1.png", "b/train/1.png"], "splits inside other folders, a/test, b/train"),
    ],
)
def test_splits_are_never_mixed(tmp_path, load, paths, message):
    write_pictures(*(tmp_path / path for path in paths))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_shards_of_no_split_are_never_mixed_with_those_of_one(own_cache):
    for name in ("train-1.parquet", "Test.parquet"):
        write_rows(own_cache / name, ["a"])
    assert list(load_labelled_images(str(own_cache))) == ["train", "test"]
    write_rows(own_cache / "others.parquet", ["a"])
    with pytest.raises(ValueError, match=r"named after splits, beside others.parquet, which are not"):
        load_labelled_images(str(own_cache))


@pytest.mark.parametrize("name", ["[ab] c", "c*d?", "猫 и", "a&b=c#d%20"])
@pytest.mark.parametrize("kind", ["classes", "parquet", "metadata"])
def test_names_may_have_any_characters_and_lead_through_links(own_cache, kind, name):
    write_as(kind, own_cache / name / "there")
    (own_cache / name / "train").symlink_to(own_cache / name / "there", target_is_directory=True)
    (own_cache / "elsewhere").mkdir()
    (own_cache / name / "there").rename(own_cache / "elsewhere" / name)
    (own_cache / name / "train").unlink()
    (own_cache / name / "train").symlink_to(own_cache / "elsewhere" / name, target_is_directory=True)
    (own_cache / "elsewhere" / name / "again").symlink_to(own_cache / "elsewhere", target_is_directory=True)
    splits = load_labelled_images(str(own_cache / name))
    assert [decode(row).size for row in splits["train"]] == [(8, 8)] * 2 and list(class_names(splits).values()) == [
        "a",
        "b",
    ]


def test_a_name_that_is_no_text_is_named(tmp_path):
    write_pictures(tmp_path / "a" / "1.png")
    (tmp_path / "b\udcff").mkdir()
    with pytest.raises(ValueError, match=r"the name of '.*b\\udcff' is no UTF-8 text: rename it"):
        load_labelled_images(str(tmp_path))


def test_the_first_folder_is_the_class_whatever_lies_below(tmp_path):
    write_pictures(tmp_path / "b" / "1.png", tmp_path / "a" / "x" / "2.png", tmp_path / "a" / "y" / "z" / "test_3.png")
    split = load_labelled_images(str(tmp_path))["train"]
    names = split.features["label"].names
    assert {row["image"]["path"][-5:]: names[row["label"]] for row in split} == {
        "1.png": "b",
        "2.png": "a",
        "3.png": "a",
    }
    write_pictures(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="loose.png lies beside the folders of the classes a, b, and in none"):
        load_labelled_images(str(tmp_path))


def test_a_folder_that_was_meant_to_be_a_class_is_not_passed_over(tmp_path, caplog):
    write_pictures(tmp_path / "cells" / "1.png", tmp_path / "others" / "2.png")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    assert load_labelled_images(str(tmp_path))["train"].features["label"].names == ["cells", "others"]
    assert "nothing holds no pictures, and is no class" in caplog.text and "MACOSX" not in caplog.text
    (tmp_path / "debris").mkdir()
    (tmp_path / "debris" / "notes.txt").write_text("of a telephone")
    assert len(load_labelled_images(str(tmp_path))["train"]) == 2
    (tmp_path / "debris" / "1.heic").write_bytes(b"of a telephone")
    with pytest.raises(
        ValueError, match="debris lies among the folders of the classes, and of its 2 files, such as 1.heic, none can"
    ):
        load_labelled_images(str(tmp_path))


def test_metadata_without_rows_are_named(own_cache):
    write_pictures(own_cache / "pictures" / "1.png")
    (own_cache / "pictures" / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(ValueError, match="the metadata of .*pictures have no rows"):
        load_labelled_images(str(own_cache / "pictures"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("csv", "file_name;label\n1.png;a\n", r"csv has the columns file_name;label, .* separated by commas"),
        ("csv", "name,label\n1.png,a\n", r"csv has the columns name, label, and none called file_name\n"),
        ("csv", "file_name,label\n1.png,ä\n", r"csv is not UTF-8 .*; save it as UTF-8"),
        ("jsonl", '{"name": "1.png"}\n', r"jsonl has the columns name, and none called file_name\n"),
        ("jsonl", "file_name,label\n1.png,a\n", r"jsonl has a first line that cannot be read"),
        ("jsonl", '[{"file_name": "1.png"}]', r"jsonl must have a line such as .*; its first line is \["),
        ("jsonl", '{"file_name": "1.png"}\n{', r"jsonl: .*JSON"),
        ("csv", "label, file_name\na,1.png\n", r"csv has the columns label,  file_name, and none called file_name"),
        ("csv", "file_name,label\n1.png,a\n2.png,b,c\n", r"csv: .*Expected 2 fields in line 3"),
        ("csv", "", r"csv has the columns none"),
    ],
)
def test_a_table_of_pictures_that_cannot_be_read_is_named(own_cache, name, content, message):
    write_pictures(own_cache / "pictures" / "1.png")
    (own_cache / "pictures" / f"metadata.{name}").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_labelled_images(str(own_cache / "pictures"))


@pytest.mark.parametrize("column", ["label", "class", "category"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_that_are_text_become_classes_in_order(own_cache, ending, column):
    write_pictures(*(own_cache / f"{index}.png" for index in range(4)))
    labels = ["dog", "cat", "eel", None]
    table = pandas.DataFrame({"file_name": [f"{index}.png" for index in range(4)], column: labels})
    if ending == "csv":
        table.to_csv(own_cache / "metadata.csv", index=False)
    elif ending == "jsonl":
        table.to_json(own_cache / "metadata.jsonl", orient="records", lines=True)
    else:
        write_rows(own_cache / "train.parquet", labels, column)
        [path.unlink() for path in own_cache.glob("*.png")]
    splits = load_labelled_images(str(own_cache))
    assert class_names(splits) == {0: "cat", 1: "dog", 2: "eel"} and splits["train"]["label"][:] == [1, 0, 2, None]
    with pytest.raises(ValueError, match="has the labels dog, eel, which are none of the 2 classes given"):
        load_labelled_images(str(own_cache), names=["cat", "cow"])


# -------------------------------------------------------------------------- parts of small and uneven data


def split_of(counts: dict[str, int]) -> datasets.Dataset:
    names = sorted(counts)
    labels = [names.index(name) for name, count in counts.items() for _ in range(count)]
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"label": labels}, features)


def counts_of(split) -> dict[str, int]:
    names = split.features["label"].names
    return dict(Counter(names[label] for label in split["label"]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(
    "counts", [{f"c{index:02}": 8 for index in range(20)}, {"a": 9, "b": 1, "c": 2}, {"a": 1000, "b": 3, "c": 10}]
)
def test_every_class_that_has_two_pictures_is_trained_and_held_out(counts, share, caplog):
    rest, held_out = map(counts_of, hold_out(split_of(counts), share, seed=0))
    assert {name: rest[name] + held_out.get(name, 0) for name in counts} == counts
    for name, count in counts.items():
        assert held_out.get(name, 0) == pytest.approx(min(max(share * count, 1), count - 1), abs=1)
        assert (name in held_out) == (count > 1)
    assert any("a single picture, which stays in training: b" in line for line in caplog.messages) == (
        1 in counts.values()
    )


def test_a_share_keeps_its_size_where_the_classes_allow_it():
    drawn, rest = draw_by_class(split_of({"a": 15, "b": 15, "c": 30}), 0.1, 0, "--share")
    assert len(drawn) == 6 and len(rest) == 54
    assert counts_of(draw_by_class(split_of({"a": 9, "b": 1}), 0.1, 0, "--train_share")[0]) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "counts, share, message",
    [({"a": 1, "b": 1}, 0.1, "--eval_share holds out .* but none has: a, b"), ({"a": 5}, 1.5, "--eval_share must be")],
)
def test_what_cannot_be_held_out_is_said_with_class_and_argument(counts, share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(split_of(counts), share, seed=0)
