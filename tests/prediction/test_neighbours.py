"""A search finds what a plain product over all embeddings finds, and draws it."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from features import MODEL, write_features, write_rows
from helpers import ASSETS

from vitae_hf.commands import search as command
from vitae_hf.failures import run_command
from vitae_hf.prediction import embeddings as reading
from vitae_hf.prediction.embeddings import read_blocks
from vitae_hf.prediction.neighbours import nearest


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("search"), 60)


def searched(capsys, *words) -> tuple[list[dict], str, int]:
    """The lines of a search, what it says beside them, and its status."""
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, list(map(str, words)), command.status)
    printed = capsys.readouterr()
    return list(map(json.loads, printed.out.splitlines())), printed.err, stopped.value.code


def test_neighbours_are_those_of_one_product_over_all(tmp_path):
    generator = np.random.default_rng(0)
    embeddings, queries = generator.normal(size=(100, 8)), generator.normal(size=(3, 8)).astype(np.float32)
    embeddings[[7, 8]], embeddings[50:60] = 0.0, np.nan  # without a direction; with an error
    embeddings[90] = 2 * embeddings[20]  # of equal score, later
    queries[2] = embeddings[20]
    folder = write_rows(tmp_path / "rows", [f"{i}.png" for i in range(100)], embeddings, 9, dtype="float32")
    kept = np.delete(np.arange(100), np.s_[50:60])
    lengths = np.linalg.norm(embeddings[kept], axis=1, keepdims=True).clip(1e-9)
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (embeddings[kept] / lengths).T
    for found, own in zip(nearest(folder, queries, 12), scores):
        order = np.argsort(-own.round(5), kind="stable")[:12]
        assert [neighbour.path for neighbour in found] == [f"{row}.png" for row in kept[order]]
        assert np.allclose([neighbour.score for neighbour in found], np.sort(own)[::-1][:12], atol=1e-5)
    assert len(nearest(folder, queries, 500)[0]) == 90


def test_no_more_than_a_block_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 16)
    folder = write_rows(tmp_path / "rows", [f"{i}.png" for i in range(100)], np.ones((100, 4)), rows_per_part=50)
    assert [len(block.embeddings) for block in read_blocks(folder)] == [16, 16, 16, 2] * 2


def test_a_picture_finds_itself_and_others_of_its_class(features, tmp_path, capsys):
    pictures = sorted((features.parent / "pictures" / "Trouser").glob("*.png"))[:2]
    rows, _, status = searched(capsys, features, *pictures, "--top_k", 3, "--output", tmp_path / "sheets" / "sheet.png")
    assert status == 0 and [row.get("rank") for row in rows] == [1, 2, 3, 1, 2, 3, None]
    for row, picture in zip(rows[:4:3], pictures):
        assert row["query"] == str(picture) == str(features.parent / "pictures" / row["path"])
        assert row["score"] == pytest.approx(1, abs=1e-4)
    assert all(row["path"].startswith("Trouser/") for row in rows[:6])
    assert rows[-1]["model"] == MODEL and rows[-1]["pictures"] == 2
    assert grey_share(tmp_path / "sheets" / "sheet.png") < 0.01


def grey_share(sheet: Path) -> float:
    """The share of a sheet in the grey of a picture that is not there."""
    with PIL.Image.open(sheet) as picture:
        return float((np.asarray(picture.convert("RGB")) == 200).all(-1).mean())


def test_a_picture_that_is_gone_is_a_grey_field(features, tmp_path, capsys):
    folder = write_rows(tmp_path / "rows", ["gone.png"], np.ones((1, 64)))
    (folder / "predict.json").write_text((features / "predict.json").read_text())
    rows, _, status = searched(capsys, folder, ASSETS / "sneaker.png")
    assert status == 0 and rows[0]["path"] == "gone.png" and rows[-1]["output"] == str(folder / "search.png")
    assert 0.2 < grey_share(folder / "search.png") < 0.5


def test_a_picture_that_cannot_be_read_is_named_and_the_others_searched_for(features, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    PIL.Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tiff")
    words = tmp_path / "text.png", tmp_path / "none.png", tmp_path / "float.tiff"
    rows, said, status = searched(capsys, features, *words, ASSETS / "sneaker.png", "--output", tmp_path / "sheet.png")
    assert status == 1 and rows[-1]["failed"] == list(map(str, words)) and len(rows) == 11
    assert "text.png" in said and "none.png: there is no such file" in said and "float.tiff: its values are" in said
    rows, _, status = searched(capsys, features, words[0], "--output", tmp_path / "other.png")
    assert status == 1 and rows[-1]["output"] is None and not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "no/such"}, "no/such"),
        ({"model": None}, "predict.json names no model"),
        ({"weights": "0" * 64}, f"{MODEL} is another model now than that of the embeddings: weights differ"),
        ({"image_mean": [0.1] * 3}, "image_mean differ"),
    ],
)
def test_another_model_than_that_of_the_embeddings_is_refused(features, tmp_path, capsys, changed, said):
    folder = write_rows(tmp_path / "rows", ["a.png"], np.ones((1, 64)))
    record = json.loads((features / "predict.json").read_text())
    (folder / "predict.json").write_text(json.dumps({**record, **changed}))
    rows, err, status = searched(capsys, folder, ASSETS / "sneaker.png")
    assert status == 1 and not rows and said in err.splitlines()[-1]


def test_embeddings_of_another_length_are_refused(features, tmp_path, capsys):
    folder = write_rows(tmp_path / "rows", ["a.png"], np.ones((1, 32)))
    (folder / "predict.json").write_text((features / "predict.json").read_text())
    _, said, status = searched(capsys, folder, ASSETS / "sneaker.png")
    assert status == 1 and "have 32 numbers, those of the picture 64" in said
