"""Probes predict what a plain loop predicts, and say in a sentence what is wrong with rows or labels."""

import json

import numpy as np
import pyarrow as pa
import pytest
from features import write_features, write_record, write_rows
from helpers import drawn
from pyarrow import parquet
from sklearn.model_selection import StratifiedKFold

from vitae_hf.commands import probe as command
from vitae_hf.failures import run_command
from vitae_hf.prediction import probing
from vitae_hf.prediction.embeddings import read_blocks
from vitae_hf.prediction.probing import folder_label, join_labels, probe, read_labels


def clusters(count: int = 60, width: int = 8) -> tuple[np.ndarray, list[str]]:
    """Embeddings of three classes that overlap."""
    generator = np.random.default_rng(0)
    classes = np.arange(count) % 3
    embeddings = generator.normal(size=(3, width))[classes] + generator.normal(size=(count, width))
    lengths = generator.uniform(0.2, 5, size=(count, 1))  # which a cosine does not see
    return lengths * embeddings, ["abc"[index] for index in classes]


def write_clusters(folder):
    embeddings, labels = clusters()
    write_record(write_rows(folder, [f"{label}/{i}.png" for i, label in enumerate(labels)], embeddings))
    return folder


def sentence(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, list(map(str, words)))
    assert stopped.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_features_of_a_trained_model_tell_its_classes_apart(tmp_path):
    folder = write_features(tmp_path)
    record = command.main([str(folder), "--labels", "folders"])
    written = json.loads((folder / "probe.json").read_text())
    for name in ("nearest_neighbours", "logistic_regression"):
        figures = written[name]
        assert 75 < figures["accuracy_percent"] < 95
        assert figures["accuracy_percent"] == pytest.approx(np.mean(figures["folds_percent"]))
        assert record[f"{name}_std_percent"] == round(np.std(figures["folds_percent"]), 2) > 0
    matrix = np.array(written["confusion_matrix"])
    assert matrix.sum() == record["images"] == 200 and record["classes"] == len(matrix) == 10
    assert 100 * matrix.trace() / 200 == written["top1_percent"]
    assert written["top1_percent"] == pytest.approx(written[written["best"]]["accuracy_percent"])
    assert len(drawn(folder / "probe_confusion.png")[1]) > 20


def test_nearest_neighbours_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(probing, "NEIGHBOURS", (1,))
    embeddings, labels = clusters()
    unit, shares = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(embeddings, labels):
        nearest = [max(train, key=lambda other, row=row: unit[row] @ unit[other]) for row in test]
        shares.append(100 * np.mean([labels[row] == labels[other] for row, other in zip(test, nearest)]))
    figures = probe(embeddings, labels, seed=3)["nearest_neighbours"]
    assert figures["folds_percent"] == pytest.approx(shares) and figures["chosen"] == [1] * 5


def test_labels_that_mean_nothing_are_predicted_no_better_than_by_chance():
    generator = np.random.default_rng(1)
    figures = probe(generator.normal(size=(300, 64)), generator.choice(list("abc"), 300).tolist())
    assert all(25 < figures[name]["accuracy_percent"] < 42 for name in ("nearest_neighbours", "logistic_regression"))


def test_the_seed_decides_about_the_folds():
    assert probe(*clusters(), seed=1) == probe(*clusters(), seed=1) != probe(*clusters(), seed=2)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parts_in_csv_hold_what_parts_in_parquet_hold(tmp_path, dtype):
    embeddings, _ = clusters()
    embeddings[[3, 40]] = np.nan  # rows with an error
    paths = [f"a, {i}.png" for i in range(60)]
    for format in ("csv", "parquet"):
        blocks = list(read_blocks(write_rows(tmp_path / format, paths, embeddings, 7, format, dtype)))
        assert sum(block.left_out for block in blocks) == 2 and len(blocks) == 9
        assert np.array_equal(
            np.concatenate([block.embeddings for block in blocks]),
            np.delete(embeddings, [3, 40], 0).astype(dtype).astype(np.float32),
        )
        found = [path for block in blocks for path in block.paths.to_pylist()]
        assert found == [path for i, path in enumerate(paths) if i not in (3, 40)]


def test_classes_and_paths_may_be_called_as_others_call_no_value(tmp_path):
    names = ["NA", "null", "nan", "N/A", "#N/A"]
    for format in ("csv", "parquet"):
        (block,) = read_blocks(write_rows(tmp_path / format, names, np.zeros((5, 4)), 7, format, labels=names))
        assert block.paths.to_pylist() == block.labels.to_pylist() == names


def test_a_row_with_an_error_is_left_out_whatever_stands_for_its_embedding(tmp_path):
    write_rows(tmp_path, ["a.png", "b.png"], np.zeros((2, 4)))
    table = parquet.read_table(tmp_path / "part-00000.parquet")
    parquet.write_table(table.set_column(2, "error", pa.array(["damaged", None])), tmp_path / "part-00000.parquet")
    (block,) = read_blocks(tmp_path)
    assert block.paths.to_pylist() == ["b.png"] and block.left_out == 1


def test_labels_are_read_from_both_kinds_of_file(tmp_path):
    (tmp_path / "labels.csv").write_text(
        '\ufeffnote,path,label\nx,"a, 1.png",01\n,b.png,\n,c.png,2\n', encoding="utf-8"
    )
    assert read_labels(tmp_path / "labels.csv") == {"a, 1.png": "01", "c.png": "2"}
    (tmp_path / "open.csv").write_text('path,label\na.png,"' + 200_000 * "x")
    with pytest.raises(ValueError, match="open.csv cannot be read behind line .*: field larger than field limit"):
        read_labels(tmp_path / "open.csv")
    parquet.write_table(pa.table({"path": ["a", "b"], "label": [7, None]}), tmp_path / "labels.parquet")
    assert read_labels(tmp_path / "labels.parquet") == {"a": "7"}


def test_a_shard_is_no_folder_of_a_class():
    assert [folder_label(path) for path in ("x/dog/1.png", "1.png", "x/train.tar/1.jpg", "x/a.parquet/3")] == [
        "dog",
        *[None] * 3,
    ]


def test_what_has_no_label_or_no_embedding_is_left_out_and_counted(tmp_path, capsys):
    embeddings, labels = clusters()
    embeddings[59] = np.nan
    write_record(write_rows(tmp_path / "rows", [f"{i}.png" for i in range(60)], embeddings), model="m")
    lines = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines[2:], "gone.png,a"]))
    record = command.main([str(tmp_path / "rows"), "--labels", str(tmp_path / "labels.csv")])
    assert [record[name] for name in ("images", "unreadable", "unlabelled", "unmatched")] == [57, 1, 2, 2]
    said = capsys.readouterr().err
    assert "2 pictures have no label and are left out: 0.png, 1.png" in said
    assert "2 labels are of paths without an embedding and are left out: 59.png, gone.png" in said
    data = join_labels(tmp_path / "rows", read_labels(tmp_path / "labels.csv"))
    assert data.labels == labels[2:59] and np.allclose(data.embeddings, embeddings[2:59], atol=1e-2)


LABELS = {
    "columns.csv": ("path,class\n0.png,a\n", "columns.csv must have the columns path and label; it has path, class"),
    "two.csv": ("path,label\n0.png,a\n0.png,b\n", "two.csv gives 0.png two labels, 'a' and 'b'"),
    "other.csv": (
        "path,label\nz.png,a\n",
        "has an embedding and a label: it has paths such as a/0.png, the labels such as",
    ),
    "labels.txt": ("", "--labels takes a .csv or .parquet file, or the word folders; got"),
    "one.csv": ("path,label\na/0.png,a\nb/1.png,a\n", "all 2 pictures have the label 'a'"),
    "few.csv": (
        "path,label\na/0.png,a\nb/1.png,b\n",
        "at least 5 pictures, one for each fold; fewer have 'a' (1), 'b' (1)",
    ),
    "damaged.parquet": ("none", "damaged.parquet"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_do_not_fit_are_one_sentence(tmp_path, capsys, name):
    (tmp_path / name).write_text(LABELS[name][0])
    assert LABELS[name][1] in sentence(capsys, write_clusters(tmp_path / "rows"), "--labels", tmp_path / name)


def test_a_folder_without_good_embeddings_is_one_sentence(tmp_path, capsys):
    rows = tmp_path / "rows"
    words = rows, "--labels", "folders"
    assert "rows has no predict.json: it must be a folder that `vitae predict" in sentence(capsys, *words)
    write_clusters(rows)
    first = rows / "part-00000.parquet"
    whole = parquet.read_table(first)
    parquet.write_table(whole.drop_columns("embedding"), first)
    assert f"{first}: there are no embeddings in it: run `vitae predict` with" in sentence(capsys, *words)
    parquet.write_table(whole.drop_columns("label"), first)
    assert "it lacks the columns label; it has path, error, embedding" in sentence(capsys, *words)
    first.write_bytes(first.read_bytes()[:-100])
    assert str(first) in sentence(capsys, *words)
    write_rows(rows, ["a/x.png"], np.full((1, 8), np.inf))
    assert "the embeddings of 1 pictures are not finite" in sentence(capsys, *words)
    first.unlink()
    assert "has no part-*.parquet or part-*.csv" in sentence(capsys, *words)
    (rows / "predict.json").write_text("{")
    assert "predict.json is damaged" in sentence(capsys, *words)


def test_embeddings_that_differ_in_length_are_one_sentence(tmp_path, capsys):
    write_clusters(tmp_path)
    lists = pa.array([[1.0, 2, 3], [1, 2, 3, 4, 5]], pa.list_(pa.float32()))
    none = pa.array([None, None], pa.string())
    table = pa.table({"path": ["a/0.png", "b/1.png"], "label": none, "error": none, "embedding": lists})
    parquet.write_table(table, tmp_path / "part-00000.parquet")
    assert "part-00000.parquet: it has embeddings of 3, 5 numbers" in sentence(capsys, tmp_path, "--labels", "folders")


def test_parts_of_two_models_are_one_sentence(tmp_path, capsys):
    write_rows(tmp_path, ["a/0.png"], np.ones((1, 4)))
    (tmp_path / "part-00000.parquet").rename(tmp_path / "part-00001.parquet")
    write_clusters(tmp_path)
    assert "part-00001.parquet: it has embeddings of 4 numbers" in sentence(capsys, tmp_path, "--labels", "folders")
