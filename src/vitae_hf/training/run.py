# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The life of a training run, from its command line to its record, written once for all tasks.

A [`Task`] says what is special about its task: arguments, data, model and trainer, figures, pictures and card.
[`run_task`] does the rest: it trains or resumes, stops on a signal, evaluates, saves, reports and publishes.
"""

import dataclasses
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedConfig, set_seed
from transformers.training_args import OptimizerNames

from ..data.folders import Folder
from ..environment import environment
from ..failures import about
from ..messages import printable
from ..model_folders import read_json
from .arguments import RunArguments, ViTAETrainingArguments, parse_arguments
from .average import FOLDER as AVERAGE_FOLDER
from .checkpoints import find_checkpoint, last_checkpoint
from .curves import draw_curves
from .loaders import DEALING
from .trainer import ViTAETrainer


COSINE = ("min_learning_rate", "cooldown_epochs", "warmup_learning_rate")
"""Arguments that shape the schedule of [`ViTAETrainer`], which tasks with the library's schedules do not have."""
SCHEDULE = dict.fromkeys(
    ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "the schedule is the authors', which --warmup_steps, --min_learning_rate and --cooldown_epochs shape",
)
"""Arguments that tasks with the schedule of [`ViTAETrainer`] leave idle, with the reason."""

AnyTrainer = TypeVar("AnyTrainer", bound=ViTAETrainer)


class Task(ABC, Generic[AnyTrainer]):
    """What one kind of run does in its own way.

    A subclass is a dataclass whose fields are the groups of its arguments, each a dataclass too: `run` is the first,
    `training` the last. The docstring of its module is what `--help` says of the command.

    Attributes:
        command: as users type it.
        defaults: of arguments whose default differs for this task.
        refused: the Trainer's arguments that do not go with this task, each with the sentence that says so.
        idle: arguments that have no effect in this task, each with the reason.
        accuracies: metrics of an evaluation, in percent, to draw as curves.
        metrics: those of an evaluation, for `--metric_for_best_model`; default: `accuracies` and the loss.
    """

    command: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}
    refused: ClassVar[dict[str, str]] = {}
    idle: ClassVar[dict[str, str]] = {}
    accuracies: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ()

    run: RunArguments
    training: ViTAETrainingArguments

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Self:
        """The task with the arguments of a command line, which overrides the recipe of `--config`.

        Raises:
            ValueError: an argument is unknown or out of bounds, or does not go with another or with this task.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass
        groups: tuple[Any, ...] = tuple(field.type for field in fields)
        description = sys.modules[cls.__module__].__doc__
        task = cls(*parse_arguments(argv, groups, cls.command, description, cls.idle, **cls.defaults))
        for name, sentence in cls.refused.items():
            if getattr(task.training, name):
                raise ValueError(sentence)
        metrics, best = task.metrics or (*task.accuracies, "loss"), task.training.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in metrics:
            raise ValueError(f"--metric_for_best_model must be one of {', '.join(metrics)}; got {best!r}")
        return task

    @abstractmethod
    def build_trainer(self) -> AnyTrainer:
        """The trainer with its model, data and image processor; sets `run.eval_split` where it was left open."""

    @abstractmethod
    def figures(self, trainer: AnyTrainer, metrics: dict[str, float]) -> dict[str, Any]:
        """What the record says of this task, from the metrics of the last evaluation."""

    @abstractmethod
    def settings(self, trainer: AnyTrainer) -> dict[str, Any]:
        """Settings for the card's table, in addition to [`common_settings`] or in their place."""

    @abstractmethod
    def card(self, trainer: AnyTrainer, record: dict[str, Any], **values: Any) -> ModelCard:
        """The model card, from the record and the values of [`card_values`]."""

    def draw(self, trainer: AnyTrainer, record: dict[str, Any]) -> list[Path]:
        """Write files of the task's own into the output folder, and return the pictures that the card shows."""
        return []


def run_task(task: Task[Any], publish: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Train, evaluate and save; in the first process also report and publish.

    Args:
        publish: what publishes a folder, a room beside this one: [`vitae_hf.hub.publishing.publish`].

    Returns:
        The figures, or where the run stopped if it was told to.

    Raises:
        ValueError: the output folder holds what an earlier run left, and that run is not to be resumed.
    """
    training = task.training
    refuse_earlier_run(training, task.run)
    is_published = take_over_pushing(training)
    set_seed(training.seed)
    trainer = task.build_trainer()
    trainer.stop.signals = (signal.SIGTERM, signal.SIGINT)
    if (checkpoint := checkpoint_to_resume(training)) is not None:
        refuse_another_network(checkpoint, trainer.model)
        refuse_other_images(checkpoint, trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    step = trainer.state.global_step
    if trainer.stop.received and trainer.stop.saved_at == step:  # also if it was the last: what remains can take long
        stopped = {"stopped_by": trainer.stop.signal.name, "stopped_at_step": step}
        checkpoint = Path(training.output_dir, f"checkpoint-{step}")
        return {**stopped, "checkpoint": str(checkpoint), **environment()}
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    record = make_record(task, trainer, metrics)
    if training.should_save:
        write_report(task, trainer, record)
        if is_published:
            name, options = str(training.hub_model_id), {"token": training.hub_token, "revision": training.hub_revision}
            with about(name):
                record |= publish(Path(record["model"]), name, **options)
    return record


def exit_status(record: dict[str, Any]) -> int:
    """The status with which a command ends: as after a signal if that told the run to stop, 143 or 130."""
    return 128 + signal.Signals[record["stopped_by"]] if "stopped_by" in record else 0


def refuse_earlier_run(training: ViTAETrainingArguments, run: RunArguments) -> None:
    """See that a run which begins writes neither over one that could go on nor among what it reads.

    Raises:
        ValueError: it would.
    """
    output = Path(training.output_dir).resolve()
    if output.is_dir() and output == Path(getattr(run, "model_name_or_path", None) or "/").resolve():
        raise ValueError(f"--output_dir {training.output_dir} is the model to begin with: choose another folder")
    data = Path(run.dataset).resolve()
    if data.is_dir() and output.is_relative_to(data) and Folder(data).contents[0] == "pictures":
        raise ValueError(
            f"--output_dir {training.output_dir} lies in the data set {run.dataset}, where its pictures would be taken"
            " for data: choose another folder"
        )
    if training.resume_from_checkpoint is None and (earlier := last_checkpoint(training.output_dir)):
        raise ValueError(
            f"{earlier} is of an earlier run: continue it by --resume_from_checkpoint last, or choose another"
            " --output_dir"
        )
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    goes_on = checkpoint is True or (checkpoint and Path(checkpoint).resolve().parent == output)
    if not goes_on and (output / "config.json").is_file() and any(output.glob("*.safetensors")):
        raise ValueError(
            f"--output_dir {training.output_dir} holds a trained model, over which this run would write: choose another"
            " folder, or delete that one"
        )


def checkpoint_to_resume(training: ViTAETrainingArguments) -> Path | None:
    """The checkpoint that a run goes on from, if it goes on from one."""
    found = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    if found is True:
        return last_checkpoint(training.output_dir)
    return Path(found) if found else None


def refuse_other_images(found: Path, trainer: ViTAETrainer) -> None:
    """See that a run goes on from a checkpoint with as many images as it began with.

    With more of them others would be held out, on some of which the network was trained.

    Raises:
        ValueError: it does not.
    """
    if not (file := found / DEALING).is_file():
        return
    before, now = read_json(file).get("images"), trainer.num_train_images
    if before not in (None, now):
        raise ValueError(
            f"{found} is of a run on {before:,} training images, where there now are {now:,}: begin another with its"
            " model by --model_name_or_path, or bring the first ones back"
        )


def refuse_another_network(found: Path, model: Any) -> None:
    """See that a run goes on from a checkpoint with the network and the classes that it began with.

    Raises:
        ValueError: it does not.
    """
    if not (file := found / "config.json").is_file():
        return
    before, now = PreTrainedConfig.get_config_dict(file.parent)[0], model.config.to_dict()
    if before.get("model_type") == now["model_type"]:  # a file leaves out what the class has by itself
        before = type(model.config).from_pretrained(file.parent).to_dict()
    for name in ("model_type", "hidden_sizes", "depths", "id2label"):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{file.parent} is of a run with other {name}, {printable(before.get(name))}, where there now are"
                f" {printable(now.get(name))}: choose another --output_dir to begin a run"
            )


def take_over_pushing(training: ViTAETrainingArguments) -> bool:
    """Whether to publish in the end. If so, make the repository now, since it may fail: better before the training.

    The Trainer itself pushes nothing: it would upload logs and pickles, and both kinds of weights into one place.
    """
    wanted, training.push_to_hub = training.push_to_hub, False
    if wanted and training.should_save:
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        with about(name):
            api = HfApi(token=training.hub_token)
            made = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        training.hub_model_id = made.repo_id
    return wanted


def make_record(task: Task[Any], trainer: ViTAETrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The figures of a finished run. All processes must call this, since they add up what they skipped."""
    training, speed = task.training, trainer.throughput.images_per_s
    output = Path(training.output_dir)
    record = {
        "model": str(output if trainer.averaged_model is None else output / AVERAGE_FOLDER),
        "eval_split": task.run.eval_split,
        **task.figures(trainer, metrics),
        **({"eval_loss": round(metrics["eval_loss"], 4)} if "eval_loss" in metrics else {}),
        "images_per_s": speed and round(speed, 1),
        "learning_rate": training.learning_rate,
    }
    if hasattr(task.run, "on_bad_sample"):  # tasks that may skip pictures say how many they did
        skipped = torch.tensor(trainer.train_dataset.skipped + trainer.eval_dataset.skipped, device=training.device)
        record["skipped"] = int(trainer.accelerator.reduce(skipped))
    return {**record, "seed": training.seed, **environment(training.device.type)}


def write_report(task: Task[Any], trainer: ViTAETrainer, record: dict[str, Any]) -> None:
    """Write curves, pictures and model card beside the model, and copies beside its average, if there is one."""
    output = Path(task.training.output_dir)
    curves = output / "training_curves.png"
    draw_curves(trainer.state.log_history, curves, task.accuracies)
    pictures = [curves, *task.draw(trainer, record)]
    card = task.card(trainer, record, **card_values(task, trainer, record))
    card.save(output / "README.md")
    if trainer.averaged_model is not None:
        card.save(output / AVERAGE_FOLDER / "README.md")
        for picture in pictures:
            copy = output / AVERAGE_FOLDER / picture.relative_to(output)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(picture, copy)


def card_values(task: Task[Any], trainer: ViTAETrainer, record: dict[str, Any]) -> dict[str, Any]:
    """What the templates of all cards name."""
    return {
        "model_name": Path(task.training.output_dir).name,
        "dataset": task.run.dataset,
        "train_images": f"{trainer.num_train_images:,}",
        "eval_split": task.run.eval_split,
        "eval_images": f"{len(trainer.eval_dataset):,}",
        "image_mean": trainer.processing_class.image_mean,
        "image_std": trainer.processing_class.image_std,
        "averaged": trainer.averaged_model is not None,
        "skipped": record.get("skipped", 0),
        "settings": {**common_settings(trainer), **task.settings(trainer), "seed": task.training.seed},
        "environment": ", ".join(f"{name} {record[name]}" for name in ("device", "torch", "transformers", "date")),
    }


def common_settings(trainer: ViTAETrainer) -> dict[str, Any]:
    """The settings that the cards of all tasks list."""
    training, state = trainer.args, trainer.state
    return {
        "optimizer": OptimizerNames(training.optim).value,
        "learning rate": f"{training.learning_rate:g}",
        "weight decay": f"{training.weight_decay:g}",
        "epochs": round(state.epoch or 0, 2),
        "updates": state.global_step,
        "global batch": training.global_batch_size,
    }
