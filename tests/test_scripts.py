"""The scripts, run as a user runs them, and the README's snippets."""

import json
import re

import PIL.Image
import pytest
import torch
from helpers import ASSETS, REPOSITORY, last_line, original_weights, run, write_malicious
from hub_server import HubServer

from vitae_hf import config_from_preset


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


def test_the_readmes_snippets_run(demo, monkeypatch, capsys):
    """All Python blocks in order, in one session, in a folder where the demo has run."""
    root, _ = demo
    monkeypatch.chdir(root)
    for folder in ("examples", "src"):
        if not (root / folder).exists():
            (root / folder).symlink_to(REPOSITORY / folder)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert "score" in printed


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
