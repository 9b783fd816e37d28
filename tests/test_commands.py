"""Every command ends what a user can cause with one sentence on stderr and a status other than 0."""

import importlib
import os
import socket
import subprocess
import sys

import pytest
from helpers import ASSETS, DATA, REPOSITORY, run
from hub_server import HubServer

import vitae_hf
from vitae_cli import COMMANDS
from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessorPil, config_from_preset
from vitae_hf.dense.detection.models import HeadSize, detector_backbone, make_processor, new_detector
from vitae_hf.failures import about, of_a_missing_package, plain_words, run_command


SCENES = REPOSITORY / "examples" / "garment_scenes"
PICTURE = ASSETS / "sneaker.png"
WRAPPERS = {"evaluate_model": "evaluate", "pretrain_mae": "pretrain", "train_segmentation": "segment"}
WRAPPERS |= {"train_detection": "detect"}
WRAPPERS |= {"push_to_hub": "push", "verify_checkpoint": "verify", "convert_original_checkpoint": "convert"}
PARTS_OF_SCRIPTS = ("gpu_parts", "claims_networks", "claims_pictures", "claims_report", "kept_results")
SCRIPTS = sorted(path.stem for path in (REPOSITORY / "scripts").glob("*.py") if path.stem not in PARTS_OF_SCRIPTS)


def load(name: str):
    return importlib.import_module(f"vitae_hf.commands.{name}" if name in COMMANDS else name)


def sentence(capsys, name: str, *words) -> str:
    """What a command says as it ends."""
    with pytest.raises(SystemExit) as stopped:
        run_command(load(name).main, list(map(str, words)))
    assert stopped.value.code in (1, 2)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and not printed.out.startswith("{")
    last = printed.err.splitlines()[-1]
    assert "error: " in last
    return last


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ViTAEForImageClassification(config_from_preset("vitae-nano")).save_pretrained(folder)
    ViTAEImageProcessorPil(size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """A detector of the library and one of this package."""
    folder = tmp_path_factory.mktemp("detectors")
    for name in ("rt_detr", "mask_rcnn"):
        backbone = detector_backbone(config_from_preset("vitae-nano"), name)
        new_detector(name, backbone, {0: "a"}, HeadSize(32, 1, 5)).save_pretrained(folder / name)
        make_processor(name, {"height": 64, "width": 64}).save_pretrained(folder / name)
    return folder


# What takes a model, a data set or a folder to write in, with these in place of {}.
TAKES_MODEL = {
    "predict": [PICTURE, "--model", "{}", "--output", "out"],
    "train": ["--model_name_or_path", "{}", "--dataset", DATA, "--output_dir", "out", "--report_to", "none"],
    "segment": [
        "--model_name_or_path",
        "{}",
        "--dataset",
        SCENES,
        "--output_dir",
        "out",
        "--report_to",
        "none",
    ],
    "detect": ["--model_name_or_path", "{}", "--dataset", SCENES, "--output_dir", "out", "--report_to", "none"],
    "evaluate": ["--model_name_or_path", "{}", "--dataset", DATA, "--split", "test", "--output", "out"],
    "explain": ["{}", PICTURE, "--output", "out"],
    "export": ["{}", "--format", "torch", "--output", "out"],
    "measure_explanations": ["{}", "--output", "out"],
    "push": ["{}", "--repo_id", "org/mine"],
    "verify": ["{}"],
    "convert": ["{}", "--output", "out"],
}
TAKES_DATA = {
    "predict": ["{}", "--model", "vitae-nano-fashion", "--output", "out"],
    "train": ["--preset", "vitae-nano", "--dataset", "{}", "--output_dir", "out", "--report_to", "none"],
    "pretrain": ["--preset", "vitae-nano-mae", "--dataset", "{}", "--output_dir", "out", "--report_to", "none"],
    "segment": ["--preset", "vitae-nano", "--dataset", "{}", "--output_dir", "out", "--report_to", "none"],
    "detect": ["--preset", "vitae-nano", "--dataset", "{}", "--output_dir", "out", "--report_to", "none"],
    "evaluate": ["--model_name_or_path", "model", "--dataset", "{}", "--output", "out"],
    "compare_claims": ["--data", "{}", "--output", "out"],
    "measure_statistics": [ASSETS, "--data", "{}", "--output", "out.json"],
    "compare_fashion_mnist": ["--data", "{}", "--output", "out"],
    "compare_pretraining": ["--preset", "vitae-nano", "--data", "{}", "--output", "out.json"],
    "measure_loading": ["--dataset", "{}"],
    "measure_export": ["--photographs", "{}", "--presets"],
    "build_fashion_mnist": ["{}", "--output", "out"],
}
WRITES = {
    "predict": [PICTURE, "--model", "model", "--output", "{}"],
    "train": [
        "--preset",
        "vitae-nano",
        "--dataset",
        DATA,
        "--report_to",
        "none",
        "--output_dir",
        "{}",
        "--max_steps",
        "1",
    ],
    "explain": ["model", PICTURE, "--output", "{}"],
    "evaluate": ["--model_name_or_path", "model", "--dataset", DATA, "--output", "{}"],
    "export": ["model", "--format", "torch", "--output", "{}"],
    "build_garment_scenes": ["--scenes", "1", "1", "--output", "{}"],
    "build_model_cards": ["--output", "{}"],
    "demo": ["--output", "{}"],
    "compare_claims": ["--data", DATA, "--output", "{}"],
    "measure_statistics": [ASSETS, "--data", DATA, "--output", "{}.json"],
    "compare_fashion_mnist": ["--data", DATA, "--output", "{}"],
    "compare_detection": ["--max_steps", "1", "--output", "{}"],
    "compare_pretraining": ["--preset", "vitae-nano", "--output", "{}.json"],
}


def fill(words, value) -> list[str]:
    return [str(word).replace("{}", str(value)) for word in words]


@pytest.mark.parametrize("command", TAKES_MODEL)
@pytest.mark.parametrize("given", ["no/such", "missing/folder/of/one", "empty", "file.txt"])
def test_a_model_that_is_none_is_named(tmp_path, monkeypatch, capsys, command, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no model")
    assert given in sentence(capsys, command, *fill(TAKES_MODEL[command], given))


@pytest.mark.parametrize("command", ["predict", "train", "segment", "explain", "export"])
@pytest.mark.parametrize("name, saved", [("rt_detr", "RTDetrFor"), ("mask_rcnn", "RCNNFor")])
def test_a_detector_where_a_classifier_is_expected_is_named_for_what_it_is(
    detectors, tmp_path, monkeypatch, capsys, command, name, saved
):
    if command == "export":
        pytest.importorskip("transformers.exporters.runners", reason="exporting takes transformers 5.23")
    monkeypatch.chdir(tmp_path)
    said = sentence(capsys, command, *fill(TAKES_MODEL[command], detectors / name))
    assert f"{detectors / name}" in said and f"{saved}ObjectDetection" in said and len(said) < 300


@pytest.mark.parametrize("command", TAKES_DATA)
@pytest.mark.parametrize("given", ["no/such", "missing/folder/of/data", "empty", "file.txt"])
def test_a_data_set_that_is_none_is_named(tmp_path, monkeypatch, capsys, command, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no pictures")
    assert given in sentence(capsys, command, *fill(TAKES_DATA[command], given))


@pytest.mark.parametrize("command", WRITES)
def test_where_nothing_can_be_written_the_place_is_named(tmp_path, monkeypatch, capsys, command, model):
    if command == "export":
        pytest.importorskip("transformers.exporters.runners", reason="exporting takes transformers 5.23")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "file.txt").write_text("in the way")
    assert "file.txt" in sentence(capsys, command, *fill(WRITES[command], tmp_path / "file.txt" / "out"))


@pytest.mark.parametrize("command", ["train", "pretrain", "segment", "detect"])
@pytest.mark.parametrize(
    "words, said",
    [
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "broken.yaml"], "broken.yaml is no YAML"),
        (["--config", "list.yaml"], "list.yaml must hold arguments"),
        (["--config", "wrong.yaml"], "argument --learning_rate"),
        (["--config", "many.yaml"], "many.yaml: learning_rate must be one value"),
        (["--config", "nothing.yaml"], "nothing.yaml: learning_rate has no value"),
        (["--no_such", "1"], "--no_such"),
        (["--learning_rate", "fast"], "argument --learning_rate"),
        (["--preset", "nothing"], "nothing"),
        (["--eval_split", "nothing"], "nothing"),
        (["--train_split", "nothing"], "nothing"),
        (["--resume_from_checkpoint", "nothing"], "nothing"),
    ],
)
def test_a_wrong_recipe_or_argument_is_named(tmp_path, monkeypatch, capsys, command, words, said):
    monkeypatch.chdir(tmp_path)
    texts = {
        "broken": "a: [1\n",
        "list": "- 1\n",
        "wrong": "learning_rate: fast\n",
        "many": "learning_rate: [1]\n",
        "nothing": "learning_rate:\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    data = SCENES if command in ("segment", "detect") else DATA
    assert said in sentence(capsys, command, *fill(TAKES_DATA[command], data), "--max_steps", 1, *words)


@pytest.mark.parametrize(
    "command, words",
    [
        *(
            ("train", words)
            for words in (
                ["--interpolation", "nothing"],
                ["--auto_augment", "nothing"],
                ["--min_crop_scale", "2"],
                ["--erasing_prob", "3"],
                ["--mixup_alpha", "-1"],
            )
        ),
        ("pretrain", ["--interpolation", "nothing"]),
        ("pretrain", ["--label_smoothing_factor", "0.1"]),
        ("segment", ["--label_smoothing_factor", "0.1"]),
        ("segment", ["--short_side", "0"]),
        ("segment", ["--crop_size", "0"]),
        ("segment", ["--head_channels", "0"]),
        ("segment", ["--flip_prob", "2"]),
        ("detect", ["--detector", "yolo"]),
        ("detect", ["--short_sides", "0"]),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_begins(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    data = SCENES if command in ("segment", "detect") else DATA
    said = sentence(capsys, command, *fill(TAKES_DATA[command], data), "--max_steps", 1, *words)
    assert words[0].removeprefix("--") in said and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "explain", "predict", "benchmark", "measure_parity"])
def test_a_device_that_is_not_there_is_named(capsys, model, command):
    words = {"evaluate": fill(TAKES_DATA["evaluate"], DATA), "explain": [model, PICTURE]}.get(command, [])
    assert "there is no device 'nothing' here" in sentence(capsys, command, *words, "--device", "nothing")


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    def wrong(argv):
        return {}["missing"]

    with pytest.raises(KeyError):
        run_command(wrong)


def test_the_cause_and_not_its_wrapping_tells_whose_mistake_it_is(capsys):
    def fails(argv):
        with about("org/name"):
            try:
                raise ConnectionError("nobody listens")
            except OSError as error:
                raise RuntimeError("upload failed") from error

    with pytest.raises(SystemExit, match="1"):
        run_command(fails)
    assert "for org/name (nobody listens)" in capsys.readouterr().err


def test_a_command_that_is_interrupted_or_not_listened_to_ends_without_a_traceback(tmp_path):
    code = "from vitae_hf.failures import run_command\ndef main(argv):\n    {}\nrun_command(main)"
    python = [sys.executable, "-c"]
    interrupted = subprocess.run([*python, code.format("raise KeyboardInterrupt")], capture_output=True, text=True)
    assert (interrupted.returncode, interrupted.stderr.strip()) == (130, "stopped")
    loop = code.format("[print('line', number, flush=True) for number in range(100_000)]")
    with subprocess.Popen([*python, loop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_what_a_worker_says_is_said_without_its_traceback():
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ValueError\nValueError: cannot read 7.png: cut short\n'
    )
    assert plain_words(error) == "cannot read 7.png: cut short"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_ends_through_the_one_mechanism(name):
    text = (REPOSITORY / "scripts" / f"{name}.py").read_text()
    guard = text.rpartition('if __name__ == "__main__":')[2]
    command = WRAPPERS.get(name, name)
    ending = f'main(["{command}", *sys.argv[1:]])' if command in COMMANDS else "run_command(main"
    assert guard.strip().startswith(ending) and guard.count("\n") == 2


def vitae(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "vitae_cli", *words], capture_output=True, text=True, check=False)


def test_vitae_lists_its_commands_without_torch_and_names_the_nearest_of_a_wrong_one():
    assert all(f"  {name} " in vitae().stdout for name in COMMANDS) and len(COMMANDS) == 16
    assert vitae("--version").stdout.strip() == vitae_hf.__version__
    wrong = vitae("trian")
    assert wrong.returncode == 2 and wrong.stderr == "error: there is no command 'trian'; did you mean 'train'?\n"
    code = "import sys, vitae_cli; vitae_cli.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_a_command_is_for_with_its_lines_as_they_are(capsys, command):
    module = importlib.import_module(f"vitae_hf.commands.{command}")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert module.__doc__ in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("evaluate", "datasets"), ("probe", "sklearn")])
def test_a_missing_extra_is_one_sentence_with_what_mends_it(tmp_path, command, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    done = run(command, "--help", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    expected = f'error: `vitae {command}` needs {package}, which is not installed: pip install "vitae-hf[train]"'
    assert done.stderr.splitlines()[-1] == expected


def test_a_package_that_is_missed_later_is_told_too_and_others_are_not_taken_for_an_extra():
    missing = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")
    expected = 'this needs matplotlib, which is not installed: pip install "vitae-hf[train]"'
    assert plain_words(missing) == expected
    assert of_a_missing_package(missing, "x", "explain") == expected.replace("this", "x").replace("train", "explain")
    assert of_a_missing_package(missing, "x", "export") == expected.replace("this", "x")
    assert of_a_missing_package(ModuleNotFoundError("No module named 'vitae_hf.x'", name="vitae_hf.x")) is None
    assert of_a_missing_package(ImportError("cannot import name 'x'", name="matplotlib")) is None


def test_a_name_that_the_hub_does_not_have_ends_the_process_with_one_sentence(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        variables = hub.environment(tmp_path / "home")
        done = run("train", *fill(TAKES_MODEL["train"], "no/such"), "--output_dir", tmp_path, **variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert "no/such" in done.stderr.splitlines()[-1]


def test_a_port_that_is_taken_ends_the_page_with_one_sentence(tmp_path, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("app", "--model", model, "--models", tmp_path, "--port", port)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(port) in done.stderr.splitlines()[-1]
