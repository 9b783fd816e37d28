"""What is in a row, whatever the picture, the model and the source; a picture that cannot be read has a row too."""

import csv
import errno
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas
import PIL.features
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers import class_token_config, windowed_config, write_bad_files
from predictions import MODEL, content, picture, rows_of, run_predict, write_folder, write_parquet, write_tar
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import vitae_hf
from vitae_hf import ViTAEForPreTraining, ViTAEImageProcessor, ViTAEImageProcessorPil, ViTAEv2Backbone, predict
from vitae_hf.loading import load_trained
from vitae_hf.prediction import listing, reading
from vitae_hf.prediction.reading import Chunk, Item, PictureReader


EMPTY = dict.fromkeys(("label", "score", "labels", "scores"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"), range(30))


@pytest.fixture
def trained():
    return load_trained(MODEL)


def save(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    ViTAEImageProcessor(size=64, crop_pct=1.0).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------- what rows hold


def test_rows_have_the_labels_and_scores_of_the_pipeline(pictures, tmp_path):
    record = run_predict(pictures, output=tmp_path / "out", embeddings="float32")
    rows = rows_of(tmp_path / "out")
    files = sorted(pictures.rglob("*.png"))
    assert [row["path"] for row in rows] == [str(file.relative_to(pictures)) for file in files]
    classify = pipeline("image-classification", model=vitae_hf.find_model(MODEL))
    for row, expected in zip(rows, classify(list(map(str, files)), top_k=5)):
        assert row["labels"] == [entry["label"] for entry in expected] and row["label"] == row["labels"][0]
        assert row["scores"] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
        assert row["score"] == row["scores"][0] and row["error"] is None
    assert (record["pictures"], record["errors"], record["parts"], record["done_before"]) == (30, 0, 3, 0)


def test_embeddings_are_what_the_classifier_reads_and_half_precision_rounds_them(pictures, tmp_path, trained):
    model, processor = trained
    files = sorted(pictures.rglob("*.png"))
    expected = model(**processor(list(map(str, files)), return_tensors="pt")).pooler_output.detach().numpy()
    for dtype, distance in (("float32", 1e-5), ("float16", 1e-2)):
        run_predict(pictures, output=tmp_path / dtype, embeddings=dtype)
        found = np.array([row["embedding"] for row in rows_of(tmp_path / dtype)])
        assert np.abs(found - expected).max() < distance * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["headless", "autoencoder", "backbone"])
def test_models_without_a_classifier_give_embeddings_alone(pictures, tmp_path, kind):
    if kind == "headless":
        model = AutoModel.from_config(class_token_config())
    elif kind == "autoencoder":
        model = ViTAEForPreTraining(class_token_config(conv_kernel_size=1))
    else:
        model = ViTAEv2Backbone(windowed_config())
    save(tmp_path / "model", model.eval())
    run_predict(pictures, output=tmp_path / "out", model=tmp_path / "model")
    processor = ViTAEImageProcessor(size=64, crop_pct=1.0)
    pixels = processor(str(pictures / "00" / "003.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if kind == "headless":
            expected = model(pixels).pooler_output[0]
        elif kind == "autoencoder":
            expected = model.encode(pixels)[0, 1:].mean(0)
        else:
            expected = model(pixels).feature_maps[-1][0].mean((1, 2))
    row = rows_of(tmp_path / "out")[3]
    assert {name: row[name] for name in EMPTY} == EMPTY and row["error"] is None
    assert row["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_multi_label_models_give_a_probability_for_each_label(pictures, tmp_path):
    model = AutoModelForImageClassification.from_config(windowed_config(problem_type="multi_label_classification"))
    torch.nn.init.normal_(model.classifier.weight)
    save(tmp_path / "model", model.eval())
    run_predict(pictures, output=tmp_path / "out", model=tmp_path / "model", top_k=9)
    rows = rows_of(tmp_path / "out")
    pixels = ViTAEImageProcessor(size=64, crop_pct=1.0)(str(pictures / "00" / "000.png"), return_tensors="pt")
    expected = model(**pixels).logits.sigmoid()[0].sort(descending=True)
    assert rows[0]["scores"] == pytest.approx(expected.values.tolist(), abs=1e-5) and len(rows[0]["scores"]) == 5
    assert rows[0]["labels"] == [model.config.id2label[index] for index in expected.indices.tolist()]


def test_datasets_and_pandas_read_the_folder(pictures, tmp_path):
    run_predict(pictures, output=tmp_path / "out", embeddings="float16")
    files = sorted(map(str, (tmp_path / "out").glob("part-*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    frame = pandas.concat(map(pandas.read_parquet, files), ignore_index=True)
    assert data["label"][:] == frame["label"].tolist() and len(data) == 30
    assert data.features["embedding"] == datasets.List(datasets.Value("float16"))
    assert {len(embedding) for embedding in data["embedding"][:]} == {64}
    assert data.features["score"] == datasets.Value("float32")


def test_csv_has_the_same_rows_with_lists_as_json(pictures, tmp_path):
    run_predict(pictures, output=tmp_path / "parquet", embeddings="float32")
    run_predict(pictures, output=tmp_path / "csv", embeddings="float32", format="csv")
    found = []
    for path in sorted((tmp_path / "csv").glob("part-*.csv")):
        with open(path, newline="") as file:
            found += list(csv.DictReader(file))
    for row, expected in zip(found, rows_of(tmp_path / "parquet"), strict=True):
        assert (row["path"], row["label"], row["error"]) == (expected["path"], expected["label"], "")
        assert np.float32(row["score"]) == np.float32(expected["score"])
        for name in ("labels", "scores", "embedding"):
            assert json.loads(row[name]) == pytest.approx(expected[name]) or json.loads(row[name]) == expected[name]


def test_numbers_that_are_not_finite_are_an_error_of_their_row(trained):
    model, processor = trained
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    (row,) = predict(model, processor, [picture(0)])
    assert row["error"] == "the model gave picture 0 numbers that are not finite" and row["label"] is None


# -------------------------------------------------------------------------------------------------- what is read


def test_python_takes_pictures_of_every_kind_as_they_are_needed(pictures, trained):
    path = pictures / "00" / "001.png"
    given = [str(path), path, content(1), picture(1), np.asarray(picture(1)), {"bytes": content(1), "path": None}]
    asked = []

    def several():
        for number, each in enumerate(given * 2):
            asked.append(number)
            yield each

    rows = predict(*trained, several(), batch_size=2, top_k=3, embeddings="float16")
    first = next(rows)
    assert len(asked) < 8 and first["path"] == str(path) and len(first["labels"]) == 3
    for number, row in enumerate(rows, 1):
        assert row["label"] == first["label"] and row["score"] == pytest.approx(first["score"], abs=1e-6)
        assert row["path"] == (str(path) if number % 6 < 2 else f"picture {number}") and row["embedding"].shape == (64,)
    with pytest.raises(ValueError, match="`embeddings` must be"):
        next(predict(*trained, [], embeddings="int8"))
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        next(predict(*trained, [], top_k=0))


MODES = dict.fromkeys(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "PNG")
MODES |= dict.fromkeys(("CMYK", "LAB", "I", "F"), "TIFF")


@pytest.mark.parametrize("processor_class", [ViTAEImageProcessor, ViTAEImageProcessorPil])
@pytest.mark.parametrize("mode", MODES)
def test_workers_make_the_processors_pixels_of_every_mode(mode, processor_class):
    image = picture(3).convert("L").convert("I;16" if mode == "I;16" else mode) if mode != "RGB" else picture(3)
    buffer = io.BytesIO()
    image.save(buffer, MODES[mode])
    processor = processor_class(size={"height": 32, "width": 24}, crop_pct=0.9)
    batch = PictureReader(processor)[Chunk("", [Item("x", buffer.getvalue())], True)]
    expected = processor(PIL.Image.open(buffer), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert batch.errors == [None] and torch.equal(batch.pixel_values, expected["pixel_values"])
    assert batch.pixel_values.dtype == torch.uint8


def odd_files(folder: Path) -> set[str]:
    """Forty files; returns the names of those that are no good pictures."""
    folder.mkdir()
    for mode, format in MODES.items():
        image = picture(3).convert("L").convert(mode) if mode != "RGB" else picture(3)
        image.save(folder / f"mode-{mode.replace(';', '')}.{format.lower()}")
    formats = {"BMP": "bmp", "GIF": "gif", "ICO": "ico", "JPEG": "jpg", "JPEG2000": "jp2", "PCX": "pcx", "PPM": "ppm"}
    formats |= {"SGI": "sgi", "TGA": "tga", "TIFF": "tif", "WEBP": "webp", "DDS": "dds", "IM": "im", "SPIDER": "spider"}
    formats |= {"MSP": "msp", "XBM": "xbm", "DIB": "dib", "ICNS": "icns"}
    for format, ending in formats.items():
        image = picture(3).convert({"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(format, "RGB"))
        image.resize((64, 64)).save(folder / f"format.{ending}", format)
    shutil.copy(folder / "format.jpg", folder / "called-otherwise.png")
    bad = {file.name for file in write_bad_files(folder).values()} - {"pixels.png", "postscript.png"}
    for name, data in {"page.jpg": b"<!DOCTYPE html>", "zeros.webp": bytes(1000), "half.jpg": content(1)[:90]}.items():
        (folder / name).write_bytes(data)
        bad.add(name)
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    return bad | {"gone.png", "itself.png"}


def test_forty_odd_files_are_each_answered_in_their_row(tmp_path):
    bad = odd_files(tmp_path / "odd")
    (tmp_path / "odd" / "postscript.png").unlink()  # whether it is read depends on a program beside Pillow
    record = run_predict(tmp_path / "odd" / "*", output=tmp_path / "out", batch_size=8)
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == record["pictures"] == len(list((tmp_path / "odd").iterdir())) >= 40
    assert {name for name, row in rows.items() if row["error"]} == bad and record["errors"] == len(bad)
    assert all((row["label"] is None) == (row["error"] is not None) for row in rows.values())
    said = {name: rows[name]["error"].replace(str(tmp_path), "") for name in bad}
    assert said["text.png"] == "cannot read /odd/text.png: cannot identify image file '/odd/text.png'"
    assert "could be decompression bomb" in said["bomb.png"] and "No such file" in said["gone.png"]
    assert all(f"cannot read /odd/{name}: " in sentence for name, sentence in said.items())


def test_links_in_circles_unreadable_folders_and_names_that_are_no_text_are_rows(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", range(9))
    (tmp_path / "in" / "00" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "locked").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/na\xefve.png")).write_bytes(content(0))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):  # root may read all folders
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    run_predict(tmp_path / "in", output=tmp_path / "out")
    errors = {row["path"]: row["error"] for row in rows_of(tmp_path / "out") if row["error"]}
    assert set(errors) == {"00/circle", "locked", "na\\udcefve.png"} and len(rows_of(tmp_path / "out")) == 12
    assert "leads to a folder above it" in errors["00/circle"] and "no UTF-8 text" in errors["na\\udcefve.png"]
    assert errors["locked"] == "cannot read locked: Permission denied"


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), ConnectionResetError("reset")])
def test_a_failing_storage_ends_the_run_and_spoils_no_rows(pictures, tmp_path, monkeypatch, error):
    read = reading.contents

    def fail(item):
        if item.name == "04/028.png":
            raise ValueError("cannot read") from error
        return read(item)

    monkeypatch.setattr(reading, "contents", fail)
    with pytest.raises(ValueError, match="cannot read"):
        run_predict(pictures, output=tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) in (10, 20) and not any(row["error"] for row in rows_of(tmp_path / "out"))
    monkeypatch.undo()
    run_predict(pictures, output=tmp_path / "out")
    assert [row["error"] for row in rows_of(tmp_path / "out")] == [None] * 30


def test_a_failing_storage_is_no_fault_of_a_shard(tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", range(3))

    def fail(path):
        raise ConnectionResetError("reset")

    monkeypatch.setattr(listing, "tar_samples", fail)
    with pytest.raises(ConnectionResetError):
        run_predict(tmp_path / "x.tar", output=tmp_path / "out")
    assert not rows_of(tmp_path / "out")


# ----------------------------------------------------------------------------------------------- where it is from


def test_every_source_gives_the_same_rows_by_its_own_names(pictures, tmp_path, monkeypatch):
    run_predict(pictures, output=tmp_path / "files")
    expected = [{**row, "path": None} for row in rows_of(tmp_path / "files")]
    parquet, tar = write_parquet(tmp_path / "a.parquet", range(30)), write_tar(tmp_path / "b.tar", range(30))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/datasets/org/name@abc/data/a.parquet", parquet.read_bytes())
    url = "memory://datasets/org/name@abc/data/a.parquet"
    monkeypatch.setattr(listing, "find_data_files", lambda *source: {"train": [url]})
    for source, name in (
        (f"{pictures}/**/*.png", f"{pictures}/00/000.png"),
        (parquet, f"{parquet}/0"),
        (tar, f"{tar}/000.png"),
        ("org/name", "data/a.parquet/0"),
    ):
        output = tmp_path / f"of-{Path(source).suffix}-{len(list(tmp_path.iterdir()))}"
        run_predict(source, output=output)
        rows = rows_of(output)
        assert rows[0]["path"] == name and len({row["path"] for row in rows}) == 30
        for row, other in zip(rows, expected, strict=True):  # other batches round otherwise
            assert {**row, "path": None} == {**other, **{key: pytest.approx(other[key]) for key in ("score", "scores")}}


def test_a_folder_of_everything_is_read_below_its_name_and_other_files_are_counted(tmp_path, caplog):
    folder = write_folder(tmp_path / "in", range(3))
    write_parquet(folder / "a.parquet", range(12))
    (folder / "z").mkdir()
    write_tar(folder / "z" / "b.tar", range(5))
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(content(0))
    other = write_folder(tmp_path / "other", range(3))
    with caplog.at_level("WARNING"):
        record = run_predict(folder, other, output=folder / "out")
    assert record["left_out"] == 1 and record["pictures"] == 3 + 12 + 5 + 3
    record = run_predict(folder, other, output=folder / "out")  # does not read what it wrote itself
    assert (record["pictures"], record["done_before"]) == (0, 23)
    names = [row["path"].removeprefix(f"{folder}/") for row in rows_of(folder / "out")]
    assert names[2:5] == ["00/002.png", "a.parquet/0", "a.parquet/1"]
    assert names[15:17] == ["z/b.tar/000.png", "z/b.tar/001.png"]


@pytest.mark.parametrize("write, name", [(write_parquet, "x.parquet"), (write_tar, "x.tar")])
def test_a_damaged_shard_gives_the_rows_that_can_be_read_and_says_what_is_wrong(tmp_path, write, name):
    whole = write(tmp_path / name, range(30)).read_bytes()
    middle = len(whole) // 2
    if name.endswith("tar"):
        damaged = whole[: middle + 100]  # within a file
    else:  # the footer tells the number of rows, so the damage is in a page
        damaged = whole[:middle] + bytes(2000) + whole[middle + 2000 :]
    (tmp_path / name).write_bytes(damaged)
    for _ in range(2):  # nor is it another source the second time
        record = run_predict(tmp_path / name, output=tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    good = [row for row in rows if row["error"] is None]
    assert 8 <= len(good) < 30 and record["pictures"] == 0
    assert all("cannot read" in row["error"] and name in row["error"] for row in rows if row not in good)
    assert len(rows) == 30 if name.endswith("parquet") else rows[-1]["path"] == str(tmp_path / name)


def test_a_shard_without_pictures_is_a_row_that_lists_its_columns(tmp_path):
    pandas.DataFrame({"a": [1], "b": ["x"]}).to_parquet(tmp_path / "table.parquet")
    write_parquet(tmp_path / "x.parquet", range(3))
    run_predict(tmp_path, output=tmp_path / "out")
    (row,) = [row for row in rows_of(tmp_path / "out") if row["error"]]
    assert row["path"] == "table.parquet" and "must have a column of images, got {'a': " in row["error"]


def test_the_column_of_pictures_is_named_where_there_are_several(tmp_path):
    table = pa.table({name: [content(number)] for number, name in enumerate(("before", "after"))})
    pa.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"several columns of images, \['before', 'after'\]: .* --image_column_name"):
        run_predict(tmp_path / "pairs.parquet", output=tmp_path / "out")
    (tmp_path / "after.png").write_bytes(content(1))
    scores = []
    for source in ("pairs.parquet", "after.png"):
        run_predict(tmp_path / source, output=tmp_path / source[:5], image_column_name="after")
        scores += [row["score"] for row in rows_of(tmp_path / source[:5])]
    with pytest.raises(ValueError, match="--image_column_name is for parquet files, and .*x.tar has no columns"):
        run_predict(write_tar(tmp_path / "x.tar", range(2)), output=tmp_path / "tar", image_column_name="after")
    assert scores[0] == pytest.approx(scores[1])


def test_a_worker_that_is_killed_ends_the_run_in_plain_words(pictures, trained, monkeypatch):
    monkeypatch.setattr(PictureReader, "__getitem__", lambda self, chunk: os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match="a process that reads pictures has ended: DataLoader worker"):
        list(predict(*trained, [pictures / "00" / "000.png"], num_workers=1))
