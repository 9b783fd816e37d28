"""What is distributed works outside a checkout: the wheel has what commands need, the sdist what tests need."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from helpers import ASSETS, DATA, REPOSITORY, last_line, original_weights
from photograph_app import serving

from vitae_cli import COMMANDS
from vitae_hf import config_from_preset


SNEAKER = ASSETS / "sneaker.png"
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A wheel and an sdist of this tree."""
    tree = tmp_path_factory.mktemp("tree") / "tree"
    kept = ("src", "tests", "scripts", "examples", "model_cards", "results", "docs", ".ci")
    tree.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
        elif path.name in kept:
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, check=True, capture_output=True)
    return tree / "dist"


def wheel_of(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist):
    source = REPOSITORY / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name and ".egg-info" not in name}
    with zipfile.ZipFile(wheel_of(dist)) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_tells_type_checkers_that_it_has_types(dist):
    """PEP 561: without this file they take no annotation of an installed package into account."""
    with zipfile.ZipFile(wheel_of(dist)) as wheel:
        assert "vitae_hf/py.typed" in wheel.namelist()


def test_links_of_the_page_on_the_package_index_lead_to_files_of_the_repository(dist):
    with zipfile.ZipFile(wheel_of(dist)) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
    links = re.findall(r"(!?)\[[^\[\]]*\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 20 and all(target.startswith("https://") for _, target in links)
    for mark, target in links:
        repository, _, path = target.partition("/raw/main/" if mark else "/blob/main/")
        if "arxiv.org" not in target:
            assert repository == metadata["Home-page"] and (REPOSITORY / path.partition("#")[0]).is_file(), target


@pytest.fixture(scope="module")
def outside(dist, tmp_path_factory):
    """A folder outside any checkout, and the environment of a process that has the wheel and not this tree."""
    folder = tmp_path_factory.mktemp("outside")
    with zipfile.ZipFile(wheel_of(dist)) as wheel:
        wheel.extractall(folder / "site")
    installed = importlib.metadata.distribution("transformers").locate_file("")
    path = f"{folder / 'site'}{os.pathsep}{installed}"  # with `python -S`, which overlooks this tree's editable install
    for split, count in (("train", 60), ("test", 20)):
        (folder / "pictures").mkdir(exist_ok=True)
        rows = next(DATA.glob(f"{split}-*.parquet"))
        write_first_rows(rows, folder / "pictures" / f"{split}.parquet", count)
    torch.save(original_weights(config_from_preset("vitae-nano")), folder / "authors.pth")
    return folder, {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_first_rows(source: Path, target: Path, count: int) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(source)
    step = len(table) // count
    pyarrow.parquet.write_table(table.take(list(range(0, step * count, step))), target)


EVALUATE = "evaluate --model_name_or_path vitae-nano-fashion --dataset pictures --split test"
TRAIN = (
    "train --config vitae-t --preset vitae-nano --dataset pictures --image_size 64 --output_dir out --max_steps 2"
    " --warmup_steps 1 --per_device_train_batch_size 8 --dataloader_num_workers 0 --report_to none --save_strategy no"
    " --eval_strategy no"
)


def test_commands_of_the_wheel_work_outside_any_checkout(outside):
    """In one process, as a quick stand-in for `vitae COMMAND` of an installation; see the slow test for that."""
    folder, environment = outside
    commands = [EVALUATE, TRAIN, "explain vitae-nano-fashion", "convert authors.pth --output converted --verify"]
    code = (
        "import json, sys, vitae_cli\n"
        "records = [vitae_cli.load(words[0]).main(words[1:]) for words in map(str.split, sys.argv[1:])]\n"
        "import vitae_hf\n"
        "print(json.dumps([vitae_hf.__file__, *records]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    where, evaluated, trained, explained, converted = last_line(done)
    assert where == str(folder / "site" / "vitae_hf" / "__init__.py")
    assert evaluated["images"] == 20 and evaluated["top1_percent"] >= 70
    assert (folder / trained["model"] / "model.safetensors").is_file()
    assert explained["images"] == 2 and len(list(Path(folder, explained["output"]).glob("*.png"))) == 2
    assert converted["preset"] == "vitae-nano" and len(converted["verified"]) == 5


@pytest.mark.slow
def test_the_page_of_the_wheel_classifies_with_the_model_that_ships(outside):
    folder, environment = outside
    with serving([sys.executable, "-S", "-m", "vitae_hf", "app"], cwd=folder, **environment) as address:
        client = Client(address, verbose=False)
        _, scores, _ = client.predict(handle_file(SNEAKER), "vitae-nano-fashion", api_name="/explain_picture")
        assert scores["label"] == "Sneaker"


@pytest.mark.slow
def test_the_wheel_and_its_train_extra_are_enough(dist, outside, tmp_path):
    """Installed from the package index into a clean environment; takes minutes."""
    folder, _ = outside
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    requirement = f"vitae-hf[train] @ {wheel_of(dist).as_uri()}"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", requirement], check=True)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)

    def vitae(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [programs / "vitae", *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )

    assert all(f"  {name} " in vitae().stdout for name in COMMANDS)
    assert last_line(vitae(*EVALUATE.split(), "--output", "clean"))["images"] == 20
    assert last_line(vitae(*TRAIN.replace("out ", "clean-out ").split()))["model"]
    assert last_line(vitae("convert", "authors.pth", "--output", "clean-converted", "--verify"))["verified"]
    missing = vitae("explain", "vitae-nano-fashion")
    assert missing.returncode == 1 and 'pip install "vitae-hf[explain]"' in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_tests_of_the_sdist_run_where_it_is_unpacked(dist, tmp_path):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    chosen = ["tests/family/test_configuration.py", "tests/hub/test_model_cards.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
