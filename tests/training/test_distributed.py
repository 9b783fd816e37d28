"""Training in two processes, against the same training in one; on CPUs, with gloo.

SyncBatchNorm's own collective runs on GPUs only: here only what surrounds it is tested.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import PIL.Image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import DATA, REPOSITORY, images, last_line, options, pyramid_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from vitae_hf import ViTAEConfig, ViTAEForImageClassification, config_from_preset
from vitae_hf.data.augmentation import soft_target_loss
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.checkpoints import last_checkpoint
from vitae_hf.training.optimization import parameter_groups
from vitae_hf.training.trainer import ViTAETrainer


EXAMPLES = REPOSITORY / "examples" / "distributed"


ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT = 300
"""Seconds after which a hang is a failure."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes found in all the jobs of distributed_worker.py."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, worker.__file__, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The job `whole_run` in one process, with the same global batch."""
    return worker.whole_run(tmp_path_factory.mktemp("one_process"), ema_decay=0.9)


def found(folder: Path, job: str) -> tuple[dict, dict]:
    return tuple(torch.load(folder / f"{job}-{rank}.pt") for rank in (0, 1))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name


def test_two_processes_learn_what_one_does(folder, alone):
    """Losses, weights and averaged weights, without anything random and with frozen statistics."""
    for result in found(folder, "with_data_parallelism"):
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5) and len(set(alone["losses"])) == 4
        assert_close(result["weights"], alone["weights"], 1e-5)
        assert_close(result["average"], alone["average"], 1e-5)


def test_each_image_is_evaluated_once(folder, alone):
    """21 images in batches of 4 for two processes, one of them unreadable."""
    for result in found(folder, "with_data_parallelism"):
        for name in ("eval_loss", "eval_images", "eval_logit_sum"):
            assert result["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-5)
    trained = ViTAEForImageClassification(pyramid_config()).eval()
    trained.load_state_dict(alone["average"])
    kept = [index for index in range(worker.EVALUATED) if index != worker.UNREADABLE]
    with torch.no_grad():
        logits = trained(images(worker.EVALUATED)[kept]).logits
    assert alone["metrics"]["eval_images"] == 20
    assert alone["metrics"]["eval_logit_sum"] == pytest.approx(logits.sum().item(), abs=1e-4)
    expected = nn.functional.cross_entropy(logits, torch.tensor(kept) % 5).item()
    assert alone["metrics"]["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_two_processes_stream_each_row_once_in_an_epoch(folder):
    first, second = found(folder, "streamed")
    assert first["steps"] == second["steps"] == 10 and all(len(result["names"]) == 10 for result in (first, second))
    for epoch in (slice(0, 5), slice(5, 10)):
        seen = [name for result in (first, second) for batch in result["names"][epoch] for name in batch]
        assert sorted(seen) == sorted(f"{index}.png" for index in range(40))


def test_only_the_first_process_writes(folder):
    for job in ("with_data_parallelism", "with_sharded_weights"):
        assert (folder / job / "saved_by_0" / "model.safetensors").exists()
        assert not (folder / job / "saved_by_1").exists()
    assert (folder / "with_data_parallelism" / "saved_by_0" / "ema" / "model.safetensors").exists()


def test_each_process_draws_its_own_augmentation(folder):
    first, second = found(folder, "with_random_augmentation")
    assert len(first["draws"]) == 4
    assert all(ratio != other for (ratio, _), (other, _) in zip(first["draws"], second["draws"]))
    assert all(pixels != other for (_, pixels), (_, other) in zip(first["draws"], second["draws"]))


def test_a_resumed_run_of_two_processes_ends_as_an_uninterrupted_one(folder):
    for whole, resumed in zip(found(folder, "with_random_augmentation"), found(folder, "resumed")):
        assert resumed["draws"] == whole["draws"][2:] and resumed["losses"] == whole["losses"]
        for kind in ("weights", "average"):
            assert_close(resumed[kind], whole[kind], 0)


def test_all_processes_evaluate_with_the_statistics_of_the_first(folder):
    """BatchNorms that count each their own batches differ until then."""
    first, second = found(folder, "with_random_augmentation")
    statistics = [name for name in first["average"] if "running" in name]
    assert statistics
    for name, value in first["average"].items():
        assert torch.equal(value, first["average_before_evaluation"][name]), name
        assert torch.equal(value, second["average"][name]), name
    assert any(not torch.equal(first["average"][n], second["average_before_evaluation"][n]) for n in statistics)


def test_what_does_not_work_is_refused_early(folder):
    for messages in found(folder, "refusals"):
        assert "`sync_batch_norm` needs GPUs, by torch; on CPUs use `frozen_batch_norm`" in messages["cpu"]
        assert "`ema_decay` does not work with FSDP" in messages["fsdp"]


# ---------------------------------------------------------------------------------------------------- sharded weights


def test_sharded_training_equals_that_of_one_process(folder, alone):
    for result in found(folder, "with_sharded_weights"):
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert result["metrics"]["eval_images"] == 20
    saved = folder / "with_sharded_weights" / "saved_by_0"
    assert_close(load_file(saved / "model.safetensors"), alone["weights"], 1e-5)
    logits = ViTAEForImageClassification.from_pretrained(saved).eval()(images(worker.EVALUATED)).logits
    kept = torch.arange(worker.EVALUATED) != worker.UNREADABLE
    assert logits[kept].sum().item() == pytest.approx(result["metrics"]["eval_logit_sum"], abs=1e-4)
    code = {path.name for path in saved.glob("*.py")}
    assert code == set(ViTAEConfig.code_files)  # and none of torch's


def test_sharded_training_resumes(folder):
    whole, _ = found(folder, "with_sharded_weights")
    resumed, _ = found(folder, "resumed_with_sharded_weights")
    assert resumed["losses"] == whole["losses"]
    ours, theirs = (
        load_file(folder / job / "saved_by_0" / "model.safetensors")
        for job in ("resumed_with_sharded_weights", "with_sharded_weights")
    )
    assert_close(ours, theirs, 1e-7)


def test_sharded_training_runs_in_bfloat16(folder, alone):
    """Under autocast: weights are saved, and BatchNorm computes, in float32."""
    result, _ = found(folder, "with_sharded_weights_in_bfloat16")
    assert result["losses"] != alone["losses"] and result["losses"] == pytest.approx(alone["losses"], abs=0.01)
    saved = load_file(folder / "with_sharded_weights_in_bfloat16" / "saved_by_0" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values() if value.is_floating_point())


def test_the_library_shards_while_loading(folder):
    source = folder / "with_data_parallelism" / "saved_by_0"
    expected = ViTAEForImageClassification.from_pretrained(source).eval()(images(2)).logits
    for result in found(folder, "loaded_in_shards"):
        assert torch.allclose(result["logits"], expected, atol=1e-5)
        assert result["sharded"] < 0.55 * result["whole"]
    again = ViTAEForImageClassification.from_pretrained(folder / "loaded_in_shards" / "saved").eval()
    assert torch.allclose(again(images(2)).logits, expected, atol=1e-6)


def test_every_class_that_is_sharded_whole_is_in_the_model(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config())
    classes = {type(module).__name__ for module in model.modules()}
    prefix = "ViTAEv2" if model.config.model_type == "vitaev2" else "ViTAE"
    first = "Embeddings" if model.config.is_plain else "ReductionCell"
    embeddings = type(model.get_input_embeddings()).__name__  # accelerate shards these in any case
    assert {prefix + first, embeddings, f"{prefix}NormalCell"} <= model._no_split_modules <= classes
    names = {name for name, _ in model.base_model.named_modules()}
    for rule in model.config.base_model_fsdp_plan:
        assert (
            rule.replace("*", "0", 1).replace("*", "1") in names or rule.replace("*", "2", 1).replace("*", "1") in names
        )


# -------------------------------------------------------------------------------------------- BatchNorm, accumulation


def test_synchronised_batch_norms_change_nothing_around_them(tiny_config, tmp_path):
    """Keys, parameter groups, gradient checkpointing and reloading, of a model with SyncBatchNorm in one process."""
    torch.manual_seed(0)
    plain = AutoModelForImageClassification.from_config(tiny_config(drop_path_rate=0.0, reduction_dropout_prob=0.0))
    synchronised = type(plain)(plain.config)
    synchronised.load_state_dict(plain.state_dict())
    nn.SyncBatchNorm.convert_sync_batchnorm(synchronised)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    names = [[group["names"] for group in parameter_groups(model, 1.0, 0.1)] for model in (plain, synchronised)]
    assert names[0] == names[1]
    synchronised.gradient_checkpointing_enable()
    for model in (plain, synchronised):
        model.train()(images(2), labels=torch.arange(2)).loss.backward()
    assert_close(plain.state_dict(), synchronised.state_dict(), 1e-6)  # statistics and counts, once
    for ours, theirs in zip(plain.parameters(), synchronised.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    synchronised.save_pretrained(tmp_path)
    assert_close(type(plain).from_pretrained(tmp_path).state_dict(), synchronised.state_dict(), 0)


def test_several_processes_synchronise_batch_norms_and_one_does_not(tmp_path, monkeypatch):
    """The conversion itself, and the average of the weights after it; as if there were two GPUs."""
    alone = worker.build_trainer(tmp_path, sync_batch_norm=True)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in alone.model.modules())
    on_cpu = ViTAETrainingArguments.device.fget
    monkeypatch.setattr(ViTAETrainingArguments, "world_size", 2)
    monkeypatch.setattr(ViTAETrainingArguments, "device", property(lambda self: on_cpu(self) and torch.device("meta")))
    monkeypatch.setattr(ViTAETrainer, "_move_model_to_device", lambda *_: None)
    trainer = worker.build_trainer(tmp_path, sync_batch_norm=True, ema_decay=0.5)
    converted = [module for module in trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert converted and all(isinstance(module, nn.SyncBatchNorm) for module in converted)
    trainer.average.start()
    assert trainer.averaged_model.state_dict().keys() == alone.model.state_dict().keys()


def test_synchronised_and_frozen_statistics_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="`sync_batch_norm` and `frozen_batch_norm` exclude each other"):
        ViTAETrainingArguments(tmp_path, sync_batch_norm=True, frozen_batch_norm=True)


def test_frozen_statistics_stay_and_their_norms_learn(tmp_path):
    trainer = worker.build_trainer(tmp_path, frozen_batch_norm=True, max_steps=2)
    before = worker.copy_of(trainer.model.state_dict())
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        if "running" in name or "num_batches" in name or "random_projection" in name:
            assert torch.equal(value, before[name]), name
        else:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("loss", [soft_target_loss, None], ids=["recipe's loss", "model's loss"])
def test_accumulated_batches_equal_a_large_one(tmp_path, loss):
    states = []
    for batch, steps in ((16, 1), (8, 2)):
        trainer = worker.build_trainer(
            tmp_path,
            worker.samples(32),
            frozen_batch_norm=True,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.compute_loss_func = loss
        trainer.train()
        states.append((worker.losses(trainer), worker.copy_of(trainer.model.state_dict())))
    assert states[0][0] == pytest.approx(states[1][0], abs=1e-5)
    assert_close(states[0][1], states[1][1], 1e-5)


# ----------------------------------------------------------------------------------------------------- users' examples


def test_accelerate_reads_the_examples():
    for name in ("ddp", "fsdp2"):
        config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))  # an unknown key is an error
        assert config.mixed_precision == "bf16" and config.num_processes == 8
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def slurm(folder: Path, *arguments, **commands) -> dict:
    """How to run train_slurm.sbatch without Slurm: its commands, as scripts, in a folder that is searched first."""
    record = f"echo $@ >> {folder}/scontrol.txt; echo localhost"
    for name, text in {"srun": 'exec "$@"', "scontrol": record, **commands}.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": 1, "SLURM_GPUS_ON_NODE": 2}
    return {
        "args": ["bash", str(EXAMPLES / "train_slurm.sbatch"), *map(str, arguments)],
        "env": {**ENVIRONMENT, **{k: str(v) for k, v in job.items()}, "PATH": f"{folder}/bin:{os.environ['PATH']}"},
        "cwd": REPOSITORY,
        "text": True,
    }


@pytest.mark.slow
def test_the_script_trains_in_two_processes_as_slurm_starts_it(tmp_path):
    """An unreadable picture each to train on and to evaluate; one process prints, and counts those of both."""
    ViTAEForImageClassification(config_from_preset("vitae-nano")).save_pretrained(tmp_path / "model")
    for split, count in (("train", 16), ("validation", 7)):
        for index in range(count):
            path = tmp_path / "images" / split / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (40, 60), (10 * index, 0, 0)).save(path)
        path.write_text("no picture")
    arguments = options(
        model_name_or_path=tmp_path / "model",
        dataset=tmp_path / "images",
        output_dir=tmp_path / "out",
        max_steps=1,
        per_device_train_batch_size=8,
        on_bad_sample="skip",
        base_learning_rate=1e-3,
        use_cpu=True,
    )
    torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"'
    done = subprocess.run(**slurm(tmp_path, *arguments, torchrun=torchrun), capture_output=True, timeout=TIMEOUT)
    record = last_line(done)
    assert sum(line.startswith("{") and "top1_percent" in line for line in done.stdout.splitlines()) == 1
    assert record["skipped"] == 3  # the one to evaluate in both processes, which fill up with the pictures there are
    assert record["learning_rate"] == pytest.approx(1e-3 * 16 / 512)
    assert record["top5_percent"] == 100 and record["top1_percent"] in [
        pytest.approx(k / 6 * 100, abs=1e-2) for k in range(7)
    ]
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()


@pytest.mark.slow
def test_a_preempted_slurm_job_saves_at_one_step_and_queues_again(tmp_path):
    """SIGTERM on its way through the script, srun and torchrun to two processes in the middle of training."""
    out = tmp_path / "out"
    arguments = options(
        preset="vitae-nano",
        dataset=DATA,
        output_dir=out,
        max_steps=500,
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
    )
    torchrun = f'echo $@ > {tmp_path}/torchrun.txt; exec {sys.executable} -m torch.distributed.run "$@"'
    errors = tmp_path / "stderr.txt"
    with errors.open("w") as file:
        job = subprocess.Popen(**slurm(tmp_path, *arguments, torchrun=torchrun), stdout=subprocess.PIPE, stderr=file)
    deadline = time.monotonic() + TIMEOUT
    while not (out.exists() and last_checkpoint(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=TIMEOUT)
    lines = [line for line in output.splitlines() if line.startswith('{"stopped')]
    assert len(lines) == 1, f"{output}\n{errors.read_text()[-3000:]}"
    stopped, checkpoint = json.loads(lines[0]), last_checkpoint(out)
    assert stopped["checkpoint"] == str(checkpoint) and 0 < stopped["stopped_at_step"] < 500
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert job.returncode != 0 and f"requeue {os.getpid()}" in (tmp_path / "scontrol.txt").read_text()
    assert (tmp_path / "torchrun.txt").read_text().endswith(" --resume_from_checkpoint last\n")
