"""The scripts, run as a user runs them or in this process on tiny data."""

import copy
import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import build_fashion_mnist
import build_pretraining_cost
import compare_fashion_mnist
import compare_pretraining
import datasets
import measure_export
import measure_features
import measure_loading
import measure_predict
import measure_startup
import measure_step
import measure_windows
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import ASSETS, GOLDEN, REPOSITORY, images, last_line, original_weights, run, write_malicious
from hub_server import HubServer
from transformers import AutoConfig

from vitae_hf import config_from_preset
from vitae_hf.commands.pretrain import Pretraining
from vitae_hf.commands.train import Classification
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.deployment import benchmarking
from vitae_hf.deployment.benchmarking import interleave
from vitae_hf.deployment.exporting import load_for_export


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder as `make demo` leaves it, but for a few steps of training, and the script's record."""
    root = tmp_path_factory.mktemp("demo")
    output = root / "outputs" / "vitae-nano-fashion"
    return root, run("demo", "--epochs", 0.2, "--output", output, "--asset", root / "asset")


def test_the_demo_trains_saves_evaluates_and_draws(demo):
    root, done = demo
    record, folder = last_line(done), root / "outputs" / "vitae-nano-fashion"
    assert record["top1_percent"] > 20  # after a fifth of an epoch; ten classes
    assert {"config.json", "model.safetensors", "modeling_vitae.py", "preprocessor_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    with PIL.Image.open(folder / "predictions.png") as picture:  # whose titles are green or red, right or wrong
        colours = {colour[:3] for _, colour in picture.getcolors(10**6)}
        assert picture.size == (1380, 768) and {(44, 160, 44), (214, 39, 40)} & colours
    assert "%|" in done.stderr  # the Trainer's progress bar
    assert json.loads((folder / "config.json").read_text())["id2label"]["9"] == "Ankle boot"


def test_the_demo_renews_the_model_that_ships(demo):
    """The same files, configuration and card as those of the package, but for what another training changes."""
    found, ships = demo[0] / "asset", ASSETS / "vitae-nano-fashion"
    assert {path.name for path in found.iterdir()} == {path.name for path in ships.iterdir()}
    for name in ("config.json", "preprocessor_config.json"):
        own, theirs = (json.loads((folder / name).read_text()) for folder in (found, ships))
        assert {**own, "transformers_version": None} == {**theirs, "transformers_version": None}
    lines = [set((folder / "README.md").read_text().splitlines()) for folder in (found, ships)]
    assert {"license: apache-2.0", "## Limits"} <= lines[0] & lines[1] and len(lines[1] - lines[0]) < 12
    trained = demo[0] / "outputs" / "vitae-nano-fashion" / "model.safetensors"
    assert (found / "model.safetensors").read_bytes() == trained.read_bytes()


def test_the_demos_folder_is_published_as_it_is(demo, tmp_path):
    folder = demo[0] / "outputs" / "vitae-nano-fashion"
    with HubServer(tmp_path / "hub") as hub:
        variables = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        record = last_line(run("push", folder, "--repo_id", "org/demo", **variables))
        card = hub.content("org/demo", "README.md").decode()
    assert record["uploaded"] and record["same_logits"]
    assert "216,074 parameters for 10 classes" in card and "training_curves.png" in card


@pytest.mark.slow
def test_the_demo_at_full_length_reaches_87_percent(tmp_path):
    record = last_line(run("demo", "--output", tmp_path / "demo"))
    assert record["top1_percent"] >= 87


def test_the_converter_writes_and_verifies_a_folder(tmp_path):
    torch.save({"state_dict_ema": original_weights(config_from_preset("vitae-nano"))}, tmp_path / "nano.pth.tar")
    done = run("convert", tmp_path / "nano.pth.tar", "--output", tmp_path / "out", "--verify")
    record = last_line(done)
    assert (record["preset"], record["num_labels"], len(record["verified"])) == ("vitae-nano", 10, 5)


@pytest.mark.parametrize("preset", ["vitae-s", None])
def test_the_converter_refuses_in_plain_words(tmp_path, preset):
    write_malicious(tmp_path / "bad.pth", original_weights(config_from_preset("vitae-nano")))
    arguments = [] if preset is None else ["--preset", preset]
    done = run("convert", tmp_path / "bad.pth", "--output", tmp_path / "out", *arguments)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "Traceback" not in done.stderr and "refused" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.executed"))


def test_the_wrong_preset_is_refused_with_the_first_misfits(tmp_path):
    torch.save(original_weights(config_from_preset("vitae-nano")), tmp_path / "nano.pth")
    done = run("convert", tmp_path / "nano.pth", "--preset", "vitae-t", "--output", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "256 tensors do not fit" in done.stderr and "missing: layers.2.NC.3.norm1.weight" in done.stderr
    assert done.stderr.endswith("… and 246 more\n") and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ data, comparisons, figures

IMAGES = {"train": 1200, "t10k": 50}  # as many of each of the ten classes


@pytest.fixture(scope="module")
def idx_files(tmp_path_factory):
    """The four files as published, of random pixels: their folder, and the pixels and labels of each split."""
    folder, generator, splits = tmp_path_factory.mktemp("idx"), np.random.default_rng(0), {}
    for prefix, count in IMAGES.items():
        pixels = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.permutation(np.arange(count) % 10).astype(np.uint8)
        headers = [np.array(sizes, ">i4").tobytes() for sizes in ([2051, count, 28, 28], [2049, count])]
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb", 1) as file:
            file.write(headers[0] + pixels.tobytes())
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb", 1) as file:
            file.write(headers[1] + labels.tobytes())
        splits["test" if prefix == "t10k" else prefix] = pixels, labels
    return folder, splits


@pytest.fixture(scope="module")
def fashion(idx_files, tmp_path_factory):
    """These images as parquet, and the script's record."""
    folder = tmp_path_factory.mktemp("fashion")
    return folder, build_fashion_mnist.main([str(idx_files[0]), "--output", str(folder)])


def read_images(folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pixels and labels of each split of a folder of parquet files, read by the library."""
    splits = datasets.load_dataset(str(folder))
    return {
        name: (np.stack(list(map(np.asarray, split["image"]))), split["label"][:]) for name, split in splits.items()
    }


def test_all_of_fashion_mnist_is_written_as_it_was_read(idx_files, fashion):
    folder, record = fashion
    found = read_images(folder)
    for split, (pixels, labels) in idx_files[1].items():
        assert np.array_equal(found[split][0], pixels) and np.array_equal(found[split][1], labels)
        assert record[split] == {"images": len(labels), "bytes": next(folder.glob(f"{split}-*")).stat().st_size}
    assert load_labelled_images(str(folder))["test"].features["label"].names[9] == "Ankle boot"


def test_some_images_of_each_class_are_drawn_by_the_seed(idx_files, tmp_path):
    drawn = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        words = [str(idx_files[0]), "--output", str(tmp_path / name), "--per_class", "3", "2", "--seed", str(seed)]
        build_fashion_mnist.main(words)
        drawn.append(read_images(tmp_path / name))
    for split, count in (("train", 3), ("test", 2)):
        label_of = {image.tobytes(): label for image, label in zip(*idx_files[1][split])}
        first, again, other = (found[split] for found in drawn)
        assert [label_of[image.tobytes()] for image in first[0]] == list(first[1])
        assert len({image.tobytes() for image in first[0]}) == 10 * count
        assert np.bincount(first[1]).tolist() == [count] * 10 and list(first[1]) != sorted(first[1])
        assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])


class Runs:
    """Stands in for `vitae train` or `vitae pretrain`: reads the command line as it does, and makes up the figures."""

    def __init__(self, task, top1=None):
        self.task, self.top1, self.done, self.data = task, top1, [], []

    def main(self, words: list[str]) -> dict:
        parsed = self.task.parse(words)
        self.done.append(parsed)
        splits = load_labelled_images(parsed.run.dataset)
        self.data.append({name: {row["image"]["bytes"] for row in split} for name, split in splits.items()})
        if self.top1 is None:
            folder = Path(parsed.training.output_dir)
            folder.mkdir(parents=True)
            (folder / "eval_results.json").write_text('{"eval_loss": 1.25}')
            return {}
        return {"top1_percent": self.top1(parsed), "eval_loss": 0.5, "images_per_s": 100.0}


def check_held_out(data: dict[str, set], folder) -> None:
    """Learning rates are tested on training images that are not trained on, and never on the test images."""
    whole = {
        name: {row["image"]["bytes"] for row in split} for name, split in load_labelled_images(str(folder)).items()
    }
    assert data["train"] | data["test"] <= whole["train"] and not data["train"] & data["test"]


def test_the_comparison_of_networks_chooses_rates_on_held_out_images_and_resumes(fashion, tmp_path, monkeypatch):
    best = {"vitae": 1e-3, "vit": 2e-3, "swin": 2e-3}

    def top1(parsed) -> float:
        network = AutoConfig.from_pretrained(parsed.run.model_name_or_path).model_type
        return 70 + 2 * parsed.training.seed - 10 * (parsed.training.learning_rate != best[network])

    runs = Runs(Classification, top1)
    monkeypatch.setattr(compare_fashion_mnist, "train", runs)
    words = ["--data", str(fashion[0]), "--output", str(tmp_path / "found"), "--learning_rates", "1e-3", "2e-3"]
    words += ["--seeds", "0", "1", "--share_epochs", "0.1:3", "1:1"]
    record = compare_fashion_mnist.main(words)
    assert record["learning_rates"] == {"vitae-nano": 1e-3, "vit": 2e-3, "swin": 2e-3}
    figures = {"seeds": 2, "mean": 71, "lowest": 70, "highest": 72}
    cases = itertools.product(record["learning_rates"], (0.1, 1.0))
    assert record["summary"] == [{"network": network, "share": share, **figures} for network, share in cases]
    assert len(runs.done) == 3 * 2 + 3 * 2 * 2
    for data in runs.data[:6]:
        check_held_out(data, fashion[0])
        assert {name: len(split) for name, split in data.items()} == {"train": 120, "test": 120}
    settings = [(parsed.run.train_share, parsed.training.num_train_epochs) for parsed in runs.done[6:]]
    assert settings == [*[(0.1, 3)] * 3, *[(1, 1)] * 3] * 2
    assert "| vit | 0.002 | 71.00 (70.00–72.00) | 71.00 (70.00–72.00) |" in (tmp_path / "found.md").read_text()
    assert compare_fashion_mnist.main(words)["summary"] == record["summary"] and len(runs.done) == 18  # nothing anew
    sizes = json.loads((tmp_path / "found.json").read_text())["parameters"]
    assert max(sizes.values()) < 1.05 * min(sizes.values())


@pytest.mark.parametrize("preset", ["vitae-nano-mae", "vitae-nano"])
def test_the_comparison_with_pretraining_gives_both_ways_the_same_images_and_updates(
    preset, fashion, tmp_path, monkeypatch
):
    def top1(parsed) -> float:
        pretrained = parsed.run.model_name_or_path is not None
        best_rate = 1e-3 if pretrained else 2e-3
        return 50 + pretrained + parsed.training.seed % 1000 - 10 * (parsed.training.learning_rate != best_rate)

    pretraining, training = Runs(Pretraining), Runs(Classification, top1)
    monkeypatch.setattr(compare_pretraining, "pretrain", pretraining)
    monkeypatch.setattr(compare_pretraining, "train", training)
    words = ["--data", str(fashion[0]), "--output", str(tmp_path / "found.json"), "--work", str(tmp_path / "work")]
    words += ["--preset", preset, "--learning_rates", "1e-3", "2e-3", "--seeds", "1", "2", "--pretraining_epochs", "4"]
    shares = ["--share_epochs", "0.05:7", "0.1:3"]
    record = compare_pretraining.main([*words, *shares])
    rows = {(row["share"], row["way"]): row for row in record["summary"]}
    assert rows[0.05, "scratch"] == rows[0.1, "scratch"] | {"share": 0.05} and len(rows) == 4
    found = {"learning_rate": 2e-3, "seeds": 2, "mean": 51.5, "lowest": 51, "highest": 52}
    assert rows[0.1, "scratch"] == {"share": 0.1, "way": "scratch", **found}
    found = {"learning_rate": 1e-3, "seeds": 2, "mean": 52.5, "lowest": 52, "highest": 53}
    assert rows[0.1, "pretrained"] == {"share": 0.1, "way": "pretrained", **found}
    assert [parsed.training.seed for parsed in pretraining.done] == [1000, 1, 2]
    assert {(parsed.run.preset, parsed.training.num_train_epochs) for parsed in pretraining.done} == {(preset, 4)}
    for data, images_each in zip(training.data[:8], [60] * 4 + [120] * 4):
        check_held_out(data, fashion[0])
        assert {name: len(split) for name, split in data.items()} == {"train": images_each, "test": 1000}
    for scratch, pretrained in zip(training.done[8::2], training.done[9::2]):
        assert scratch.run.preset == preset and scratch.run.dataset == str(fashion[0])
        assert pretrained.run.model_name_or_path == str(tmp_path / "work" / f"pretrained-{scratch.training.seed}")
        for name in ("seed", "num_train_epochs", "per_device_train_batch_size"):
            assert getattr(scratch.training, name) == getattr(pretrained.training, name)
        assert scratch.run.train_share == pretrained.run.train_share
        assert (scratch.run.train_share, scratch.training.num_train_epochs) in {(0.05, 7), (0.1, 3)}
    assert len(training.done) == 16
    assert compare_pretraining.main([*words, *shares])["summary"] == record["summary"]
    assert len(training.done) == 16 and len(pretraining.done) == 3  # nothing anew
    with pytest.raises(ValueError, match="is of another training, .*: choose another --output and --work"):
        compare_pretraining.main([*words, "--share_epochs", "0.05:7", "0.1:4"])


def triple(settings: dict) -> int:
    return 3 * settings["seed"] + 1000 * torch.get_num_threads()


@pytest.mark.slow
def test_runs_of_a_comparison_share_processes_of_one_thread():
    jobs = {seed: {"seed": seed} for seed in range(3)}
    results = dict(compare_pretraining.as_they_end(triple, jobs, processes=2))
    assert results == {0: 1000, 1: 1003, 2: 1006}


def briefly(functions: dict, rounds: int, least_seconds: float, device: str):
    return interleave(functions, rounds, 0.01, device)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_speed_of_loading_counts_the_batches_after_the_first(fashion, tmp_path, monkeypatch, workers):
    """By a clock that moves on by a second whenever it is read: four batches of 8 in six seconds."""
    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    words = f"--workers {workers} --image_size 32 --batch_size 8 --seconds 5 --output {tmp_path / 'found.json'}"
    record = measure_loading.main(["--dataset", str(fashion[0]), *words.split()])
    assert record["images_per_s_by_workers"] == {workers: round(4 * 8 / 6, 1)}
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(record))


@pytest.mark.slow
def test_a_search_and_a_probe_of_random_features_are_timed(tmp_path):
    words = f"--rows 3000 --probe_rows 200 --width 16 --pictures 1 2 --output {tmp_path / 'found.json'}"
    record = measure_features.main(words.split())
    assert set(record["search"]["seconds"]) == {1, 2} and 10 < record["probe"]["top1_percent"] < 100
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(record))


def test_predicting_is_measured_beside_its_parts_and_the_pipeline(tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "cat.png").symlink_to(ASSETS / "chelsea.png")
    monkeypatch.setattr(measure_predict, "usable_cores", lambda: 1)
    words = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "found.json")]
    record = measure_predict.main([*words, "--networks", "vitae-nano", "--pictures", "40", "--rounds", "1"])
    found = record["images_per_s"]["vitae-nano"]["all_cores_shared"]
    smaller = min(found["reading"]["median"], found["model"]["median"])
    assert found["over_smaller"]["median"] == pytest.approx(found["end_to_end"]["median"] / smaller, abs=2e-3)
    assert record["draft"][64]["draft"]["largest"] > record["draft"][64]["pillow"]["largest"] >= 1
    assert record["draft"][224]["draft"]["largest"] == 0  # 500×375 is less than twice as large
    assert json.loads((tmp_path / "found.json").read_text())["pixels"] == [500, 375]


@pytest.mark.slow
def test_a_step_of_training_is_compared_with_the_plain_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_step, "interleave", briefly)
    words = f"--presets vitae-t --batch_size 2 --rounds 1 --threads 1 --output {tmp_path / 'found.json'}"
    record = measure_step.main(words.split())
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(record))
    ((preset, figures),) = record["networks"].items()
    seconds, memory = figures["seconds"], figures["saved_bytes_per_image"]
    assert preset == "vitae-t" and set(seconds) == set(memory) == {"plain", "ours"} and min(seconds.values()) > 0
    assert figures["times_as_fast"]["median"] == pytest.approx(seconds["plain"] / seconds["ours"])
    assert 10**7 < memory["ours"] < memory["plain"]
    plain_logits = measure_step.reference.logits
    monkeypatch.setattr(measure_step.reference, "logits", lambda *inputs: 1.01 * plain_logits(*inputs))
    with pytest.raises(RuntimeError, match="the two networks differ in their losses"):
        measure_step.main(words.split())


def test_the_time_of_windows_is_told_by_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_windows, "interleave", briefly)
    tiny = {"hidden_sizes": (32,), "reduction_channels": (32,), "depths": (3,), "num_attention_heads": (2,)}
    tiny |= {"conv_groups": (8,), "global_attn_indexes": (2,)}
    networks = {name: {**tiny, **fields} for name, fields in measure_windows.NETWORKS.items()}
    monkeypatch.setattr(measure_windows, "NETWORKS", networks)
    words = f"--sizes 64 --dtypes float32 --rounds 1 --output {tmp_path / 'found.json'}"
    record = measure_windows.main(words.split())
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(record))
    ((_, found),) = record["networks"].items()
    parts = {name: set(figures["shares"]) for name, figures in found.items()}
    assert parts["rotated"] == parts["rotated apart"] == set(measure_windows.PARTS)
    assert parts["plain"] - parts["plain, blind"] == {"relative positions"}
    assert parts["rotated"] - parts["plain"] == {"where a window looks", "sampling keys and values"}
    assert all(sum(figures["shares"].values()) == pytest.approx(1) for figures in found.values())


def biased(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that names the first class, whatever it sees."""
    model = copy.deepcopy(model)
    torch.nn.init.constant_(model.classifier.bias[:1].data, 1e4)
    return model


def test_exported_programs_are_compared_with_the_model_and_the_labels(fashion, tmp_path, monkeypatch):
    """Beside the model itself, in the place of programs: their export takes half a minute and has tests of its own."""
    models = {}

    def load_all(source, records) -> dict:
        model = models[len(models)] = load_for_export(source)[0]
        return {"torch_float32": model, "onnx": copy.deepcopy(model), "openvino_bfloat16": biased(model)}

    sizes = {"onnx": 3, "onnx_int8": 2, "openvino": 4}
    records = {name: {"bytes": size, "seconds": 1.5, "checks": []} for name, size in sizes.items()}
    monkeypatch.setattr(measure_export, "export_all", lambda source, root: records)
    monkeypatch.setattr(measure_export, "load_all", load_all)
    monkeypatch.setattr(measure_export, "interleave", briefly)
    monkeypatch.setattr(measure_export, "EXAMPLES", tmp_path)
    (tmp_path / "fashion_mnist_mini").symlink_to(fashion[0])
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "cat.png").symlink_to(ASSETS / "chelsea.png")
    words = ["--demo", str(ASSETS / "vitae-nano-fashion"), "--photographs", str(tmp_path / "photographs")]
    words += ["--presets", "vitae-t", "--rounds", "2", "--threads", "1", "--output", str(tmp_path / "found.json")]
    record = measure_export.main(words)
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(record))
    demo, golden = record["networks"]["vitae-nano"], record["networks"]["vitae-t"]
    assert (demo["images"], demo["image_size"], golden["images"]) == (50, [64, 64], 1)
    programs = demo["programs"]
    assert [program["bytes"] for program in programs.values()] == [None, 3, 4]
    assert programs["onnx"]["same_top1_percent"] == 100 and programs["onnx"]["rms_over_std"] == 0
    assert programs["openvino_bfloat16"]["top1_percent"] == 10  # the first of ten classes is right for a tenth
    assert programs["openvino_bfloat16"]["rms_over_std"] > 100 and "top1_percent" not in golden["programs"]["onnx"]
    for program in programs.values():
        rounds = program["milliseconds_rounds"]
        assert len(rounds) == 2 and 0 < program["milliseconds"] == pytest.approx(sum(rounds) / 2)
    expected = np.load(GOLDEN / "vitae-t_224_seed0.npz")["logits"]
    with torch.no_grad():
        logits = models[1](images(2, 224, 224)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * expected.std())


def test_the_cost_of_pretraining_is_that_of_what_was_measured():
    """The page of this repository has the table of this repository's figures, or none yet."""
    assert build_pretraining_cost.main(["--check"])["changed"] is False


def test_the_cost_of_pretraining_follows_from_epochs_and_speed(tmp_path):
    page, measured = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text((REPOSITORY / "docs" / "pretraining-cost.md").read_text())
    rows = [("vitae-s", True, 2000.0), ("vitae-s", False, 900.0), ("vit-s", False, 5000.0)]
    rows = [dict(zip(("network", "compiled", "images_per_s"), row)) for row in rows]
    training = {"rows": [*rows[1:], {"network": "vitae-t", "error": "out of memory"}]}
    parts = {"training": training, "training_compiled": {"rows": rows[:1]}}
    measured.write_text(json.dumps({"parts": parts, "device": "a GPU", "date": "2026-12-01"}))
    words = ["--measured", str(measured), "--page", str(page)]
    with pytest.raises(SystemExit):
        build_pretraining_cost.main([*words, "--check"])
    assert build_pretraining_cost.main(words)["measured"] == ["vit-s", "vitae-s"]
    text = page.read_text()
    assert "| `vitae-s` | 310 | 397 | 2,000 (compiled) | 55 | 6.9 |" in text  # 310 · 1,281,167 / 2,000 / 3,600 = 55.2
    assert "| `vitae-t` | 310 | 397 | not measured | not measured | not measured |" in text
    assert "Speeds: a GPU, 2026-12-01." in text
    page.write_text("no table here")
    with pytest.raises(ValueError, match="page.md has no lines .*, between which the table goes"):
        build_pretraining_cost.main(words)


@pytest.mark.slow
def test_the_time_to_the_first_image_is_measured_in_its_parts(tmp_path):
    words = f"--networks vitae-nano --rounds 1 --threads 1 --output {tmp_path}/startup.json"
    seconds = measure_startup.main(words.split())["seconds"]["vitae-nano"]
    assert list(seconds)[-3:] == ["prepare", "first image", "later image, ms"] and min(seconds.values()) > 0
    assert seconds["import transformers"] > seconds["import vitae_hf"]
