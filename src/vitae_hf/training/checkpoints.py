# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that count only when they are whole, so that a killed run always finds one to resume from.

While a checkpoint is written, a file `checkpoint-N.unfinished` lies beside it, and older checkpoints are kept. The next
start removes what a killed run left unfinished.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..messages import listed
from ..model_folders import not_finite
from .arguments import ViTAETrainingArguments


logger = logging.get_logger(__name__)

RESUMED = ("initial_lr", "weight_decay", "betas", "momentum", "eps")
"""Settings of an optimizer that a resumed run may change."""


def unfinished_mark(checkpoint: Path) -> Path:
    """The file that lies beside a checkpoint until all of it is written."""
    return checkpoint.with_name(checkpoint.name + ".unfinished")


def updates(checkpoint: Path) -> int:
    """The number of updates after which a whole checkpoint was written; -1 for anything else."""
    if unfinished_mark(checkpoint).exists():
        return -1
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return -1


def last_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of a run with the most updates, or none."""
    newest = max(Path(folder).glob("checkpoint-*"), key=updates, default=None)
    return None if newest is None or updates(newest) < 0 else newest


def flush(checkpoint: Path) -> None:
    """Force all files of a checkpoint to the disk, before an older checkpoint is deleted."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:  # Windows flushes what can be written
                os.fsync(file.fileno())


def remove_unfinished(folder: str | Path) -> None:
    """Delete the checkpoints that a killed run left half written."""
    for mark in Path(folder).glob("checkpoint-*.unfinished"):
        shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
        mark.unlink()


def find_checkpoint(asked: str | Path | bool | None, folder: str | Path) -> str | bool | None:
    """The checkpoint to resume from, as the library's `train` takes it.

    Args:
        asked: `"last"` for the newest whole one, which is none before the first; the path of one; or anything else that
            the library takes.
        folder: of the run.

    Raises:
        ValueError: the path leads to no whole checkpoint: it is still being written, or the run was killed meanwhile.
    """
    if asked in ("true", "True"):  # from a command line
        return True
    if asked == "last":
        asked = last_checkpoint(folder)
    elif asked and asked is not True and updates(Path(asked)) < 0:
        beside = Path(asked).parent
        raise ValueError(
            f"{asked} is not a whole checkpoint to resume from; the last one in {beside} is {last_checkpoint(beside)}"
        )
    return str(asked) if isinstance(asked, Path) else asked


def follow_rates(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """Let a schedule that was loaded go on at the learning rates of these groups, rather than those it was saved with.

    Only of `LambdaLR`, which all schedules are that have no memory of their own.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """In this block a model of the library is saved under the names that its weights have in memory.

    Of some kinds, RT-DETR among them, the library saves weights under the names of the first release, the backbone's
    too. `from_pretrained` translates them back; its Trainer does not when it resumes.
    """
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(model).pop("save_pretrained", None)


class WholeCheckpoints(Trainer):
    """The part of [`ViTAETrainer`] that saves and resumes.

    A run resumes from whole checkpoints only. A checkpoint that cannot be written is removed, and older ones are
    deleted only after a newer one is whole. Values that are not finite, of the model or its average, are not written.
    One process saves a checkpoint before an evaluation that fails, or a picture that cannot be read, ends the run.

    Attributes:
        resumed_from (`str`, *optional*): the checkpoint that the run continues.
    """

    args: ViTAETrainingArguments
    model: PreTrainedModel
    resumed_from: str | None = None

    @property
    def averaged_model(self) -> PreTrainedModel | None:
        """The model with the averaged weights, if the run averages them."""
        return None

    def train(  # type: ignore[override]  # the library's other arguments are passed on by keyword
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As the library's; [`find_checkpoint`] says what to resume from, and which error it raises."""
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.resumed_from = resume_from_checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the library's, for a checkpoint of the same optimizer: torch takes the settings of any other.

        Learning rate, weight decay and betas are those of this run, where torch takes those of the checkpoint.

        Raises:
            ValueError: the checkpoint holds the model alone, or the settings in it lack some of this optimizer's or are
                of other groups of weights.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not Path(checkpoint, SCHEDULER_NAME).is_file():
            raise ValueError(
                f"{checkpoint} holds the model alone, of a run with --save_only_model, and nothing to resume from:"
                " begin a run with it by --model_name_or_path"
            )
        optimizer: Any = self.optimizer
        settings = [{name: group[name] for name in RESUMED if name in group} for group in optimizer.param_groups]
        defaults = set(getattr(optimizer, "defaults", ()))
        needed = [defaults & set(group) for group in optimizer.param_groups]
        misfit = ""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            misfit = str(error)
        for names, group in zip(needed, optimizer.param_groups):
            if missing := names - set(group):
                name = type(getattr(optimizer, "optimizer", optimizer)).__name__
                misfit = f"{name} needs {listed(sorted(missing))}"
        if misfit:
            raise ValueError(
                f"{checkpoint} is of a run with other settings of its optimizer ({misfit}): resume with the --optim,"
                " the --layer_decay and the frozen stages that it began with, or choose another --output_dir"
            )
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)
        follow_rates(self.lr_scheduler, optimizer.param_groups)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self._updates_kept():
            return super().get_batch_samples(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._updates_kept():
            return super()._evaluate(*args, **kwargs)

    @contextmanager
    def _updates_kept(self) -> Iterator[None]:
        """In this block, which lies between two updates, an error first saves a checkpoint of those not yet saved.

        Not of several processes, since the others would not take part.
        """
        try:
            yield
        except Exception:
            step = self.state.global_step
            checkpoints = [path for path in (self.resumed_from, last_checkpoint(self.args.output_dir)) if path]
            is_saved = step == 0 or step in [updates(Path(path)) for path in checkpoints]
            is_search = self.hp_search_backend is not None  # which ends trials by errors
            if self.args.world_size == 1 and not is_saved and not is_search:
                self._save_checkpoint(self.model_wrapped, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
                logger.warning("the run fails: step %d is saved", step)
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self.check_finite()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with own_names(self.model):
            super()._save(output_dir, state_dict)

    def check_finite(self) -> None:
        """Refuse to write a model that is spoilt, since it could replace a good one.

        Raises:
            FloatingPointError: a weight or buffer of the model or its average is NaN or infinite.
        """
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not (self.args.should_save or is_sharded):  # the process that writes has all weights, and checks them
            return
        averaged = [] if self.averaged_model is None else not_finite(self.averaged_model)
        if names := not_finite(self.model) + [f"ema.{name}" for name in averaged]:
            raise FloatingPointError(
                f"nothing was written after step {self.state.global_step}, since not all values are finite of"
                f" {listed(names)}; the last checkpoint is {last_checkpoint(self.args.output_dir)}"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        run = Path(self._get_output_dir(trial=trial))
        checkpoint = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            run.mkdir(parents=True, exist_ok=True)
            unfinished_mark(checkpoint).touch()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # delete old ones only when this is whole
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.world_size == 1:  # several processes may still be writing; then the next start removes it
                shutil.rmtree(checkpoint, ignore_errors=True)
                unfinished_mark(checkpoint).unlink(missing_ok=True)
            raise OSError(
                f"{checkpoint} could not be written ({shutil.disk_usage(run).free / 2**20:.0f} MiB are free there):"
                f" {error}; the last checkpoint is {last_checkpoint(run)}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            flush(checkpoint)
            unfinished_mark(checkpoint).unlink()
            rotate_checkpoints(str(run), limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True)
