"""What can go wrong in a long run: it is told to stop, it is killed, the disk fills up, the loss is no number."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from helpers import DATA, as_words, images, last_line, pyramid_config
from transformers import TrainerCallback

from vitae_hf import ViTAEForImageClassification
from vitae_hf.data.samples import collate
from vitae_hf.failures import silence_closed_pipes
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.checkpoints import last_checkpoint, unfinished_mark, updates
from vitae_hf.training.trainer import ViTAETrainer


def command(output, *words) -> list[str]:
    """Twelve steps on real pictures with everything random in it that the recipe has."""
    values = {
        "preset": "vitae-nano",
        "dataset": DATA,
        "output_dir": output,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
        "ema_decay": 0.9,
        "report_to": "none",
        "train_share": 0.01,  # eight batches in an epoch
        "dataloader_num_workers": 1,
    }
    return [sys.executable, "-m", "vitae_hf", "train", *as_words(values), *words]


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def curve(output) -> list[tuple]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in log if "loss" in entry]


@pytest.fixture
def hears_ctrl_c():
    """As in a terminal. What a shell starts in the background ignores SIGINT, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_and_then_killed_ends_as_if_nothing_had_happened(tmp_path, number, hears_ctrl_c):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = last_line(subprocess.run(command(undisturbed), capture_output=True, text=True, check=False))

    process = subprocess.Popen(
        command(disturbed), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    wait_for(lambda: last_checkpoint(disturbed), process)
    os.killpg(process.pid, number)  # also to the loader's workers, as torchrun does
    output, _ = process.communicate(timeout=120)
    stopped = json.loads(output.splitlines()[-1])
    assert process.returncode == 128 + number and 0 < stopped["stopped_at_step"] < 12
    assert str(last_checkpoint(disturbed)) == stopped["checkpoint"]

    resume = command(disturbed, "--resume_from_checkpoint", "last")
    process = subprocess.Popen(resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: str(last_checkpoint(disturbed)) != stopped["checkpoint"], process)
    process.kill()
    process.wait()

    record = last_line(subprocess.run(resume, capture_output=True, text=True, check=False))
    different = {"model", "images_per_s", "date"}
    assert {**record, **dict.fromkeys(different)} == {**expected, **dict.fromkeys(different)}
    assert curve(disturbed) == curve(undisturbed) and len(curve(disturbed)) == 12


def trainer(folder, dataset=None, cls=ViTAETrainer, eval_dataset=None, **options):
    torch.manual_seed(0)
    if dataset is None:
        dataset = [{"pixel_values": image, "labels": i % 5, "names": i} for i, image in enumerate(images(16))]
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, **options}
    arguments = ViTAETrainingArguments(
        folder, report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **options
    )
    return cls(
        ViTAEForImageClassification(pyramid_config()),
        arguments,
        data_collator=collate,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
    )


class Killed(BaseException):
    """What no `except Exception` sees, as a killed process sees nothing."""


@pytest.mark.parametrize("moment", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_killed_while_saving_the_checkpoint_before_is_kept_and_found(tmp_path, moment):
    def kill(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        getattr(ViTAETrainer, moment)(self, *args, **kwargs)

    with pytest.raises(Killed):
        trainer(tmp_path, cls=type("Dying", (ViTAETrainer,), {moment: kill}), save_total_limit=1).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-4 is not a whole checkpoint.* the last one in .*checkpoint-2"):
        trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-9").mkdir()  # of an earlier run that was killed: newer by its number
    unfinished_mark(tmp_path / "checkpoint-9").touch()
    resumed = trainer(tmp_path, save_total_limit=1)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 4 and last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_another_optimizer_does_not_take_over_the_state_of_a_checkpoint(tmp_path):
    trainer(tmp_path).train()
    for changed, why in (
        ({"optim": "sgd"}, "SGD needs dampening, momentum"),
        ({"layer_decay": 0.5}, "different number of parameter groups"),
    ):
        with pytest.raises(
            ValueError, match=rf"checkpoint-4 is of a run with other settings of its optimizer \(.*{why}"
        ):
            trainer(tmp_path, max_steps=6, **changed).train(resume_from_checkpoint="last")


def test_an_optimizer_without_torchs_usual_settings_resumes(tmp_path):
    trainer(tmp_path, optim="adafactor").train()
    again = trainer(tmp_path, max_steps=6, optim="adafactor")
    again.train(resume_from_checkpoint="last")
    assert again.resumed_from == str(tmp_path / "checkpoint-4") and again.state.global_step == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    class Full(ViTAETrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step == 4:
                (tmp_path / "checkpoint-4" / "optimizer.pt").symlink_to("/dev/full")
            super()._save_optimizer_and_scheduler(output_dir)

    with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.* the last checkpoint is .*checkpoint-2"):
        trainer(tmp_path, cls=Full, save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert ViTAEForImageClassification.from_pretrained(tmp_path / "checkpoint-2").config.num_labels == 5


def press_ctrl_c(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_command_saves_a_checkpoint_and_twice_stops_at_once(tmp_path, times, capfd, hears_ctrl_c):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                press_ctrl_c(times)

    run = trainer(tmp_path, save_steps=100)
    run.add_callback(Press())
    run.stop.signals = (signal.SIGTERM, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) if times == 2 else nullcontext():
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"][: 2 - times]
    assert run.stop.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1


class NeverBetter(ViTAETrainer):
    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        return output._replace(metrics={**output.metrics, "eval_loss": 1.0})


@pytest.mark.parametrize("step, strategy", [(2, "no"), (4, "no"), (4, "best")])
def test_ctrl_c_in_an_evaluation_saves_a_checkpoint_when_that_ends(tmp_path, step, strategy, hears_ctrl_c):
    class Press(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == step:
                press_ctrl_c()
                run.remove_callback(Press)

    data = [{"pixel_values": image, "labels": i % 5, "names": i} for i, image in enumerate(images(2))]
    options = {"save_strategy": strategy, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    run = trainer(tmp_path, eval_dataset=data, cls=NeverBetter, max_steps=6, **options)
    run.add_callback(Press())
    run.stop.signals = (signal.SIGINT,)
    run.train()
    assert run.stop.received and run.stop.saved_at == step
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
    assert len(list(tmp_path.glob("checkpoint-*"))) == (2 if strategy == "best" else 1)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_picture_that_cannot_be_read_costs_no_update(tmp_path, split):
    class Damaged(list):
        def __getitem__(self, index):
            if index == 5:
                raise ValueError("cannot read it")
            return super().__getitem__(index)

    samples = [{"pixel_values": image, "labels": i % 5, "names": i} for i, image in enumerate(images(16))]
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, "ema_decay": 0.5}

    def run(folder, **data):
        data = {"train": samples, "eval": samples, **data}
        return trainer(tmp_path / folder, data["train"], eval_dataset=data["eval"], **options)

    undisturbed = run("undisturbed")
    undisturbed.train()
    disturbed = run("disturbed", **{split: Damaged(samples)})  # now, since a Trainer seeds when it is made
    with pytest.raises(ValueError, match="cannot read it"):
        disturbed.train()
    kept = last_checkpoint(tmp_path / "disturbed")
    assert disturbed.stop.saved_at == disturbed.state.global_step == updates(kept) > 0
    if split == "train":  # it fails at the same place again, and writes nothing over the checkpoint
        again = run("disturbed", train=Damaged(samples))
        with pytest.raises(ValueError, match="cannot read it"):
            again.train("last")
        assert again.stop.saved_at is None
    else:  # searches for hyperparameters end a trial by an error in its evaluation
        search = run("search", eval=Damaged(samples))
        search.hp_search_backend = "optuna"
        with pytest.raises(ValueError, match="cannot read it"):
            search.train()
        assert last_checkpoint(tmp_path / "search") is None
    resumed = run("disturbed")
    resumed.train("last")
    for name in ("model", "averaged_model"):
        one, other = (getattr(trained, name).state_dict() for trained in (resumed, undisturbed))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_is_printed_goes_nowhere_once_its_reader_has_ended():
    kept, (reader, writer) = os.dup(2), os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    try:
        silence_closed_pipes()
        os.write(2, b"a broken pipe would be an error")
    finally:
        os.dup2(kept, 2)
        os.close(writer)


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_batch(tmp_path):
    dataset = [{"pixel_values": image, "labels": 0, "names": f"{i}.png"} for i, image in enumerate(images(16))]
    dataset[9]["pixel_values"][0, 3, 3] = torch.inf
    run = trainer(tmp_path, dataset, max_steps=8, save_steps=1, per_device_train_batch_size=2)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError, match=r"the loss of step \d is nan, .* batch of \[.*'9.png'.*checkpoint"):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert signal.getsignal(signal.SIGTERM) == before  # a signal ends the process again


@pytest.mark.parametrize("where", ["model", "ema"])
@pytest.mark.parametrize("what", ["classifier.weight", "vitae.stages.2.normal_cells.0.conv_branch.0.norm.running_var"])
def test_no_checkpoint_or_model_with_a_value_that_is_no_number_is_written_over_a_good_one(tmp_path, where, what):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                {"model": run.model, "ema": run.averaged_model}[where].state_dict()[what][0] = torch.nan

    run = trainer(tmp_path, ema_decay=0.5, save_total_limit=1)
    run.add_callback(Spoil())
    name = what if where == "model" else f"ema.{what}"
    message = rf"nothing was written after step 4, .* not all values are finite of {name}; .*checkpoint-2"
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    with pytest.raises(FloatingPointError, match=message):
        run.save_model()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def small_pictures(side: int = 16) -> list[dict]:
    return [{"pixel_values": image, "labels": i % 5, "names": i} for i, image in enumerate(images(16, side, side))]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_device_train_batch_size": 3}, "the last batch of 16 in batches of 3 has one picture, .* 16×16 pixels"),
        ({"per_device_train_batch_size": 1}, "every batch has one picture.*: choose a larger `per_device_train_batch"),
    ],
)
def test_a_batch_that_batch_norm_cannot_normalise_is_foretold(tmp_path, options, message):
    run = trainer(tmp_path, small_pictures(), max_steps=6, save_strategy="no", **options)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    "side, options",
    [
        (16, {"dataloader_drop_last": True}),
        (16, {"frozen_batch_norm": True}),
        (16, {"per_device_train_batch_size": 4}),
        (16, {"max_steps": 2}),  # which end before the last batch
        (32, {}),
    ],
)
def test_batches_that_batch_norm_can_normalise_are_trained_on(tmp_path, side, options):
    options = {"max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": 3, **options}
    run = trainer(tmp_path, small_pictures(side), **options)
    run.train()
    assert run.state.global_step == options["max_steps"]
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_batch_norms_with_frozen_weights_take_batches_of_one(tmp_path):
    run = trainer(tmp_path, small_pictures(16), max_steps=6, save_strategy="no", per_device_train_batch_size=3)
    run.model.base_model.requires_grad_(False)
    run.train()
    assert run.state.global_step == 6


def test_without_a_checkpoint_last_begins(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_strategy="no")
    run.train(resume_from_checkpoint="last")
    assert run.state.global_step == 1


def test_a_checkpoint_that_other_processes_still_write_does_not_count(tmp_path):
    trainer(tmp_path).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    unfinished_mark(tmp_path / "checkpoint-4").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_is_removed_only_when_a_newer_one_is_whole_in_all_processes(tmp_path):
    run, seen = trainer(tmp_path, save_total_limit=1), []
    run.accelerator.wait_for_everyone = lambda: seen.append({path.name for path in tmp_path.glob("checkpoint-?")})
    run.train()
    assert seen[-1] == {"checkpoint-2", "checkpoint-4"} and last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_checkpoint_reaches_the_disk_through_files_that_can_be_written(tmp_path, monkeypatch):
    """Others cannot be flushed on Windows."""
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    trainer(tmp_path, max_steps=2).train()
    assert modes and set(modes) == {os.O_RDWR}


def test_the_workers_of_any_data_set_draw_anew_with_another_seed_and_in_another_epoch(tmp_path):
    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"pixel_values": torch.rand(3, 64, 64), "labels": 0, "names": 0}

    class Keep(ViTAETrainer):
        def training_step(self, model, inputs, *args):
            seen.append(inputs["pixel_values"][0, 0, 0, 0].item())
            return super().training_step(model, inputs, *args)

    def draws(folder, seed=0, checkpoint=None, **options):
        seen.clear()
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": False, "save_steps": 1, **options}
        trainer(tmp_path / folder, Drawn(), Keep, seed=seed, **options).train(checkpoint)
        return list(seen)

    seen = []
    whole = draws("a", max_steps=3)
    assert len({*whole, *draws("b", seed=1, max_steps=3)}) == 6 and draws("c", max_steps=2) == whole[:2]
    assert draws("c", checkpoint="last", max_steps=3) == whole[2:]


def test_a_finished_run_that_is_started_again_trains_no_update_more(tmp_path):
    trainer(tmp_path, max_steps=6).train()  # the second of four updates of an epoch
    again = trainer(tmp_path, max_steps=6)
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == 6 and last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_the_best_checkpoints_average_is_loaded_with_its_weights(tmp_path):
    dataset = [{"pixel_values": image, "labels": i % 5, "names": i} for i, image in enumerate(images(16))]
    run = trainer(
        tmp_path,
        eval_dataset=dataset,
        max_steps=4,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the worst, to be sure that it is not the last
        metric_for_best_model="loss",
        learning_rate=1e-2,
        ema_decay=0.5,
    )
    run.train()
    best = ViTAEForImageClassification.from_pretrained(run.state.best_model_checkpoint + "/ema")
    assert run.state.best_model_checkpoint != str(last_checkpoint(tmp_path))
    assert torch.equal(run.averaged_model.classifier.weight, best.classifier.weight)
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-5)


def test_a_resumed_run_goes_on_at_the_learning_rate_and_the_decay_that_are_given_now(tmp_path):
    def rates(run) -> list[float]:
        return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]

    length = {"max_steps": 8, "save_steps": 4, "logging_steps": 1}
    trainer(tmp_path, learning_rate=1e-3, weight_decay=0.1, **length).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    again = trainer(tmp_path, learning_rate=1e-4, weight_decay=0.2, **length)
    again.train(resume_from_checkpoint="last")
    fresh = trainer(tmp_path / "fresh", learning_rate=1e-4, **length)
    fresh.train()
    assert len(rates(again)) == 8 and rates(again)[4:] == rates(fresh)[4:] != rates(again)[:4]
    assert sorted({group["weight_decay"] for group in again.optimizer.param_groups}) == [0.0, 0.2]


def test_a_checkpoint_of_the_model_alone_is_nothing_to_resume_from(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-4 holds the model alone, .*: begin a run with it by"):
        trainer(tmp_path, max_steps=6).train(resume_from_checkpoint="last")
