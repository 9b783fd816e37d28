"""Evaluation counts what plain loops count, and vitae evaluate does it for a folder and a data set."""

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import DATA, class_token_config, last_line, run

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessor, ViTAEModel, config_from_preset
from vitae_hf.class_names import distinct, imagenet_names, read_class_names
from vitae_hf.commands import evaluate
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.evaluation.scores import (
    align_labels,
    all_figures,
    as_json,
    draw_confusion,
    draw_per_class,
    read_real_labels,
)
from vitae_hf.loading import label_names


FEATURES = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}


def words(**options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split(" "))]


def named_split(*paths: str | None) -> datasets.Dataset:
    """A split whose pictures bear these file names."""
    images = [{"bytes": b"", "path": path} for path in paths]
    rows = {"image": images, "label": [0] * len(images)}
    return datasets.Dataset.from_dict(rows, datasets.Features(FEATURES))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`data`: 75 pictures and a damaged one, beside another split.

    `model`: fitted to others in closed form, its classes in reverse order.
    """
    root = tmp_path_factory.mktemp("evaluation")
    splits = load_labelled_images(str(DATA))
    damaged = {"image": {"bytes": b"no picture", "path": "damaged.png"}, "label": 3}
    split = splits["test"].select(range(75))
    split = datasets.Dataset.from_list([*split.to_list(), damaged], split.features)
    (root / "data").mkdir()
    split.to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    (root / "data" / "train-00000-of-00001.parquet").write_text("nobody reads this")
    names = split.features["label"].names[::-1]
    config = config_from_preset(
        "vitae-nano", id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
    )
    torch.manual_seed(0)
    model = ViTAEForImageClassification(config).eval()
    processor = ViTAEImageProcessor(size=64, crop_pct=1.0)
    rows = splits["train"].select(range(200))
    pictures = [PIL.Image.open(BytesIO(image["bytes"])) for image in rows["image"]]
    targets = torch.nn.functional.one_hot(9 - torch.tensor(rows["label"][:]), 10).float()
    with torch.no_grad():
        pooled = model.vitae(processor(pictures, return_tensors="pt").pixel_values).pooler_output
        weight = torch.linalg.solve(pooled.T @ pooled + 0.01 * torch.eye(64), pooled.T @ targets)
        model.classifier.weight.copy_(10 * weight.T)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


def test_figures_are_those_of_plain_loops():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 200)  # never the seventh class
    scores = generator.normal(size=(200, 7)).astype(np.float32)
    figures = all_figures(scores, labels, names := list("abcdefg"))
    matrix = [[0] * 7 for _ in names]
    for row, label in zip(scores, labels):
        matrix[label][max(range(7), key=lambda index, row=row: row[index])] += 1
    assert figures["confusion_matrix"] == matrix
    assert figures["top1_percent"] == pytest.approx(100 * sum(matrix[i][i] for i in range(7)) / 200)
    for index, name in enumerate(names[:6]):
        right, images = matrix[index][index], sum(matrix[index])
        expected = {"accuracy_percent": 100 * right / images, "correct": right, "images": images}
        assert figures["per_class"][name] == expected
    assert figures["per_class"]["g"] == {"accuracy_percent": None, "correct": 0, "images": 0}
    losses = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(scores, labels)]
    assert figures["loss"] == pytest.approx(np.mean(losses))
    mistakes = [(matrix[i][j], names[i], names[j]) for i in range(7) for j in range(7) if i != j]
    worst = figures["most_confused"][0]
    assert worst["images"] == max(mistakes)[0] and (worst["images"], worst["true"], worst["predicted"]) in mistakes
    assert json.loads(as_json(figures)) == figures


def test_few_classes_have_no_top_5():
    assert "top5_percent" in all_figures(np.eye(6, dtype=np.float32), np.arange(6), list("abcdef"))
    assert "top5_percent" not in all_figures(np.eye(5, dtype=np.float32), np.arange(5), list("abcde"))


def ticks(axis, side: str) -> list[str]:
    return [label.get_text() for label in getattr(axis, f"get_{side}ticklabels")()]


def test_few_classes_are_drawn_with_names_and_counts():
    scores = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 2, 0, 2]]
    figures = all_figures(scores, np.array([0, 0, 1, 2, 2, 2, 2]), names := ["cat", "dog", "e" * 40])
    axis = draw_confusion(figures).axes[0]
    assert ticks(axis, "x") == ticks(axis, "y") == [*names[:2], "e" * 27 + "…"]
    cells = {(*text.get_position(), text.get_text()) for text in axis.texts}  # column, row
    assert cells == {(0, 0, "1"), (1, 0, "1"), (1, 1, "1"), (2, 2, "3"), (0, 2, "1")}
    axis = draw_per_class(figures).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [50, 75, 100] and ticks(axis, "y")[0] == "cat"
    assert [text.get_text() for text in axis.texts] == ["1 / 2", "3 / 4", "1 / 1"]


def test_many_classes_are_drawn_as_a_heat_map_with_the_worst_of_them():
    labels = np.arange(301).repeat(2)
    predictions = labels.copy()
    predictions[[0, 1]] = 300  # class 0 is taken for the last one
    figures = all_figures(np.eye(301, dtype=np.float32)[predictions], labels, [f"n{index}" for index in range(301)])
    axis, beside, *_ = draw_confusion(figures).axes
    heat = axis.images[0].get_array()
    assert heat.shape == (151, 151) and heat[0, 150] == 100 and heat.sum() == 152 * 100
    assert axis.images[0].get_extent()[:2] == [-0.5, 301.5]
    assert beside.texts[0].get_text().split() == ["2", "n0", "→", "n300"]
    worst, best = draw_per_class(figures).axes
    assert [bar.get_width() for bar in worst.patches] == [0] + 19 * [100] and ticks(worst, "y")[0] == "n0"
    assert len(best.patches) == 20 and ticks(best, "y")[-1] == "n300"


def test_labels_are_aligned_by_name_or_refused():
    assert align_labels(["cat", "dog", "eel"], {0: "eel", 1: "cat", 2: "dog"}).tolist() == [1, 2, 0]
    assert align_labels(["eel", "dog"], {0: "eel", 1: "cat", 2: "dog"}).tolist() == [0, 2]
    assert align_labels(["cat", "dog"], {0: "LABEL_0", 1: "LABEL_1"}).tolist() == [0, 1]
    with pytest.raises(
        ValueError, match="has 2 classes, 1 of them alone: 'cat', the model 3 classes, 2 .*: 'cow', 'fly'"
    ):
        align_labels(["cat", "dog"], {0: "cow", 1: "dog", 2: "fly"})
    with pytest.raises(ValueError, match="has 3 classes, 3 .* the model 2 classes, 2 .*: 'LABEL_0', 'LABEL_1'"):
        align_labels(["cat", "dog", "eel"], {0: "LABEL_0", 1: "LABEL_1"})


def test_no_two_names_are_the_same():
    assert distinct(["crane", "crane2", "crane", "cat", "crane"]) == ["crane", "crane2", "crane3", "cat", "crane4"]
    assert label_names(SimpleNamespace(id2label={2: "a", 0: "b", 1: "a"})) == {0: "b", 1: "a", 2: "a2"}


def test_names_of_classes_are_read_from_a_file_or_are_imagenets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet-1k").mkdir()  # the data may lie there
    assert len(set(read_class_names(Path("imagenet-1k")))) == 1000
    (tmp_path / "names.txt").write_bytes("\ufeffKatze\nHündin\n".encode())  # as some editors write it
    assert read_class_names(tmp_path / "names.txt") == ["Katze", "Hündin"]
    (tmp_path / "names.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="line 3 of .*names.txt must be the name of one more class, got 'a'"):
        read_class_names(tmp_path / "names.txt")
    with pytest.raises(ValueError, match="imagenet1k is neither a file with a class on each line nor imagenet-1k"):
        read_class_names(Path("imagenet1k"))


def test_folders_named_by_synsets_are_imagenets_classes():
    names = dict(enumerate(imagenet_names().values()))
    assert align_labels(["n01440764", "n02012849", "n03126707"], names).tolist() == [0, 134, 517]
    assert align_labels(["crane", "crane2"], names).tolist() == [134, 517]  # as the Hub's imagenet-1k calls them
    assert align_labels(["n03126707"], {0: "eel", 1: "n03126707"}).tolist() == [1]
    for other in ("n00000000", "n03126707"):
        with pytest.raises(ValueError, match="the same classes"):
            align_labels([other], {0: "cat", 1: "eel"})


def test_classes_without_names_are_taken_in_their_order_aloud(caplog):
    assert align_labels(["field", "airport"], {0: "LABEL_0", 1: "LABEL_1"}).tolist() == [0, 1]
    assert "those of the data in their order, field, airport." in caplog.text
    caplog.clear()
    assert align_labels(["airport", "field"], {0: "field", 1: "airport"}).tolist() == [1, 0] and not caplog.text


def test_real_labels_follow_the_official_file_names(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0], [1, 2], [], [2]]))
    official = "x/ILSVRC2012_val_{:08}_n01440764.JPEG".format
    assert read_real_labels(path, named_split(official(4), official(2))) == [[2], [1, 2]]
    assert read_real_labels(path, named_split("d", "c", None, "a")) == [[0], [1, 2], [], [2]]
    with pytest.raises(ValueError, match="labels for 4 pictures, but the split has 3"):
        read_real_labels(path, named_split("a", "b", "c"))
    with pytest.raises(ValueError, match="labels for 4 pictures, but the split has numbers 1 to 5"):
        read_real_labels(path, named_split(official(1), official(5)))
    with pytest.raises(ValueError, match="only some files are named"):
        read_real_labels(path, named_split(official(1), "b"))
    path.write_text("[[3]]")
    with pytest.raises(ValueError, match="none of the 3 classes"):
        read_real_labels(path, named_split("a"))


@pytest.mark.parametrize("content", ["[3, 1]", '{"a": [1]}', '[["cat"]]'])
def test_real_labels_are_lists_of_numbers(tmp_path, content):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match="must hold a list for each picture, of the numbers of its classes"):
        read_real_labels(tmp_path / "real.json", named_split("a", "b"))


def independent_top1(root, size: dict[str, int], real: list[list[int]]) -> tuple[float, float]:
    """Top-1 and ReaL accuracy of the folder, picture by picture and by class name."""
    model = ViTAEForImageClassification.from_pretrained(root / "model")
    processor = ViTAEImageProcessor.from_pretrained(root / "model", size=size)
    rows = datasets.load_dataset("parquet", data_files=str(root / "data" / "validation-*.parquet"), split="train")
    rows, right, is_real = rows.cast_column("image", datasets.Image(decode=False)), [], []
    names = rows.features["label"].names
    for row, confirmed in zip(rows.select(range(75)), real):
        inputs = processor(PIL.Image.open(BytesIO(row["image"]["bytes"])), return_tensors="pt")
        name = model.config.id2label[model(**inputs).logits.argmax().item()]
        right.append(name == names[row["label"]])
        is_real += [name in [names[label] for label in confirmed]] if confirmed else []
    return 100 * sum(right) / len(right), 100 * sum(is_real) / len(is_real)


def test_the_script_evaluates_a_folder_from_a_shell(root):
    """With labels in another order, ReaL labels by row, and a last batch that is nothing but a damaged picture."""
    real = [[index % 10, 3] if index % 4 else [] for index in range(76)]
    (root / "real.json").write_text(json.dumps(real))
    arguments = words(model_name_or_path=root / "model", dataset=root / "data", output=root / "out", batch_size=25)
    done = run("evaluate", *arguments, "--on_bad_sample", "skip", "--real_labels", root / "real.json")
    record = last_line(done)
    top1, real_percent = independent_top1(root, {"height": 64, "width": 64}, real)
    assert top1 > 50  # so that an order of classes mistaken for another would show
    assert record["top1_percent"] == pytest.approx(top1, abs=1e-3)
    assert record["real_percent"] == pytest.approx(real_percent, abs=1e-3)
    assert (record["images"], record["skipped"], record["split"], record["real_images"]) == (75, 1, "validation", 56)
    assert "images/s" in done.stderr
    written = json.loads((root / "out" / "eval_metrics.json").read_text())
    assert list(written["per_class"])[0] == "Ankle boot" and np.sum(written["confusion_matrix"]) == 75
    assert {path.name for path in (root / "out").glob("*.png")} == {"confusion_matrix.png", "per_class_accuracy.png"}


def test_another_size_crop_or_dtype_is_used(root):
    common = words(model_name_or_path=root / "model", dataset=root / "data", on_bad_sample="skip", output=root / "wide")
    wide = evaluate.main([*common, "--image_size", "48", "96"])
    top1, _ = independent_top1(root, {"height": 48, "width": 96}, [[0]] * 75)
    assert wide["image_size"] == [48, 96] and wide["top1_percent"] == pytest.approx(top1, abs=1e-3)
    variants = [[], ["--dtype", "bfloat16"], ["--crop_pct", "0.5", "--num_workers", "1"]]
    full, half, cropped = (evaluate.main([*common, *variant]) for variant in variants)
    assert half["loss"] != full["loss"] == pytest.approx(half["loss"], rel=0.05)
    assert abs(cropped["loss"] - full["loss"]) > 0.05 * full["loss"] and cropped["skipped"] == 1
    config = class_token_config()
    config.num_labels = 10
    ViTAEForImageClassification(config).save_pretrained(root / "token")
    ViTAEImageProcessor(size=64).save_pretrained(root / "token")
    assert evaluate.main([*common, *words(model_name_or_path=root / "token", image_size=96)])["images"] == 75


@pytest.mark.parametrize(
    "model, folder",
    [
        ("outputs/mine", "evaluation-mine"),
        ("outputs/mine/ema", "evaluation-mine-ema"),
        ("outputs/mine/checkpoint-4", "evaluation-mine-checkpoint-4"),
        ("org/vitae-s", "evaluation-vitae-s"),
    ],
)
def test_what_is_written_is_called_as_the_model(model, folder):
    assert evaluate.parse(words(model_name_or_path=model, dataset="x")).output == Path("outputs", folder)


def test_what_does_not_fit_is_refused_in_plain_words(root):
    common = words(model_name_or_path=root / "model", dataset=root / "data", output=root / "refused")
    with pytest.raises(ValueError, match="cannot read damaged.png"):
        evaluate.main(common)
    with pytest.raises(ValueError, match="no split 'test'; there are 'train', 'validation'"):
        evaluate.main([*common, "--split", "test"])
    ViTAEModel(config_from_preset("vitae-nano")).save_pretrained(root / "backbone")
    with pytest.raises(ValueError, match="not a trained image classifier: it lacks classifier.bias, classifier.weight"):
        evaluate.main([*common, *words(model_name_or_path=root / "backbone")])
    broken = ViTAEForImageClassification.from_pretrained(root / "model")
    broken.classifier.bias.data[:] = float("nan")
    broken.save_pretrained(root / "broken")
    ViTAEImageProcessor(size=64).save_pretrained(root / "broken")
    with pytest.raises(ValueError, match="the scores of 75 of 75 pictures are not finite"):
        evaluate.main([*common, *words(model_name_or_path=root / "broken", on_bad_sample="skip")])
