"""The way to a pretrained model that the project is for, rehearsed: the script for eight GPUs, unchanged, on a CPU.

The recipe's network, optimizer, schedule, augmentation, average, evaluations and checkpoints are as published. Pictures
are fewer and smaller, batches and epochs too, by arguments behind the script's own.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import PIL.Image
import psutil
import pytest
import torch
from helpers import DATA, IMAGE, REPOSITORY, as_words, last_line
from hub_server import HubServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitae_hf import ViTAEForImageClassification, ViTAEImageProcessor
from vitae_hf.training.checkpoints import last_checkpoint, updates


SCRIPT = REPOSITORY / "examples" / "pretrain_imagenet.sh"
NAME = "org/vitae-t-rehearsed"
UPDATES = 15  # 80 pictures in batches of 16, three epochs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """An image folder with eight pictures to train on and two to evaluate of each of ten classes."""
    folder, counts = tmp_path_factory.mktemp("pictures"), dict.fromkeys(range(10), 0)
    rows = datasets.Dataset.from_parquet(str(next(DATA.glob("train-*.parquet"))), cache_dir=str(folder / ".cache"))
    for row in rows.cast_column("image", datasets.Image(decode=False)):
        label = row["label"]
        counts[label] += 1
        if counts[label] <= 10:
            path = folder / ("train" if counts[label] <= 8 else "val") / f"class-{label}" / f"{counts[label]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.open(io.BytesIO(row["image"]["bytes"])).save(path)
    return folder


def run(launcher: str, folder: Path, pictures: Path, hub: HubServer) -> subprocess.Popen:
    """The script as a person types it, with programs of this environment."""
    fewer = {"num_train_epochs": 3, "cooldown_epochs": 1, "image_size": 32, "per_device_train_batch_size": 16}
    values = {"dataset": pictures, "hub_model_id": NAME, "use_cpu": True, "bf16": True, "logging_steps": 1, **fewer}
    variables = {
        **os.environ,
        **hub.environment(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "LAUNCHER": launcher,
        "OMP_NUM_THREADS": "1",
    }
    words = ["bash", "-x", str(SCRIPT), "vitae-t", *as_words(values), "--dataloader_num_workers", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=variables, cwd=folder, **streams)


def kill_after_its_first_checkpoint(process: subprocess.Popen, output: Path) -> tuple[int, str]:
    """The updates that the checkpoint has kept, and what the process wrote to stderr."""
    deadline = time.monotonic() + 300
    while not (checkpoint := last_checkpoint(output)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.05)
    torchrun = psutil.Process(process.pid)
    for each in [torchrun, *torchrun.children(recursive=True)]:  # it starts them in sessions of their own
        each.kill()
    return updates(checkpoint), process.communicate()[1]


def load_by_name(hub: HubServer, folder: Path) -> dict:
    """What a stranger's process gets for the name of the model, with an empty cache."""
    client = REPOSITORY / "tests" / "hub" / "hub_client.py"
    task = {"load": NAME, "revision": None, "image": str(IMAGE), "output": str(folder / "loaded.pt")}
    variables = {**os.environ, **hub.environment(folder / "stranger", token=None)}
    done = subprocess.run(
        [sys.executable, client], env=variables, input=json.dumps(task), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "loaded.pt")


def logged_updates(runs: Path) -> list[list[int]]:
    """Of each file of TensorBoard's, the updates with a loss."""
    files = sorted(runs.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    logs = [EventAccumulator(str(path)).Reload() for path in files]
    return [
        [event.step for event in log.Scalars("train/loss")] for log in logs if "train/loss" in log.Tags()["scalars"]
    ]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_under_the_other_launcher_and_its_model_loads_by_name(pictures, tmp_path):
    output = tmp_path / "outputs" / "vitae-t"
    with HubServer(tmp_path / "hub") as hub:
        kept, stderr = kill_after_its_first_checkpoint(run("torchrun", tmp_path, pictures, hub), output)
        assert "+ exec torchrun " in stderr
        resumed = run("accelerate", tmp_path, pictures, hub)
        stdout, stderr = resumed.communicate(timeout=300)
        assert "+ exec accelerate launch " in stderr
        record = last_line(subprocess.CompletedProcess(resumed.args, resumed.returncode, stdout, stderr))
        assert record["hub_commit"] == hub.repository(NAME).refs["main"] and record["same_logits"]
        loaded = load_by_name(hub, tmp_path)

    killed, rest = logged_updates(output / "runs")
    assert killed == list(range(1, len(killed) + 1)) and kept <= len(killed) < UPDATES
    assert rest == list(range(kept + 1, UPDATES + 1))
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["epoch"] for entry in log if "eval_top1" in entry][:3] == [1, 2, 3]  # the recipe's evaluations
    arguments = torch.load(last_checkpoint(output) / "training_args.bin", weights_only=False)
    assert arguments.bf16 and arguments.dataloader_num_workers == 2
    assert arguments.learning_rate == 1e-3 * 16 / 512 and arguments.ema_decay == 0.99996 ** (16 / 512)

    model = ViTAEForImageClassification.from_pretrained(output / "ema").eval()
    pixel_values = ViTAEImageProcessor.from_pretrained(output / "ema")(IMAGE, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert torch.equal(loaded["logits"], model(pixel_values).logits)


@pytest.mark.parametrize(
    ("words", "launcher", "sentence"),
    [
        ([], "torchrun", "the name of a recipe comes first, such as vitae-s, then arguments of vitae train; got ''"),
        (["vitae-t"], "slurm", "LAUNCHER must be torchrun or accelerate, got slurm"),
    ],
)
def test_what_the_script_cannot_do_it_says_in_a_sentence(words, launcher, sentence):
    variables = {**os.environ, "LAUNCHER": launcher, "PROCESSES": "1"}
    done = subprocess.run(["bash", SCRIPT, *words], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == f"error: {sentence}\n"
