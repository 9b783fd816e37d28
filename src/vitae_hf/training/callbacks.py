# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Callbacks around the updates of a run: progress and speed, an orderly end on a signal, a random state per process."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..failures import silence_closed_pipes
from .readback import Readback


logger = logging.get_logger(__name__)


class ImageProgress(ProgressCallback):
    """The library's progress bar in images instead of updates: how many, how many a second, and the time left."""

    training_bar: Any
    current_step: int
    images_per_step: int

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.current_step = state.global_step
        self.images_per_step = args.global_batch_size
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps * self.images_per_step,
                initial=state.global_step * self.images_per_step,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar.update((state.global_step - self.current_step) * self.images_per_step)
            self.current_step = state.global_step


class Throughput(TrainerCallback):
    """Images per second of updates and of waiting for data; evaluation, saving and the first update do not count.

    Attributes:
        images_per_s (`float`, *optional*): so far; none before the second update.
        seconds (`float`): that were counted.
    """

    def __init__(self) -> None:
        self.images: int = 0
        self.seconds: float = 0.0
        self._since: float | None = None

    @property
    def images_per_s(self) -> float | None:
        return self.images / self.seconds if self.seconds else None

    def _pause(self, *args: Any, **kwargs: Any) -> None:
        if self._since is not None:
            self._since = time.perf_counter()

    on_evaluate: Callable[..., None] = _pause
    on_save: Callable[..., None] = _pause

    def on_step_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.images += args.global_batch_size
            self.seconds += now - self._since
        self._since = now

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = None


class StopOnSignal(TrainerCallback):
    """On SIGTERM, which schedulers send before they take a machine back, saves a checkpoint after the update and stops.

    On SIGINT, which is Ctrl-C, it does the same if that is one of `signals`; a second one stops the process at once.
    A signal in the middle of an evaluation is heard when that ends.

    If one of several processes gets the signal, all stop after the same update, the next one: what they tell each other
    after an update is read after the next, so that none waits for its GPU. A checkpoint is saved after a whole update
    only, so that the run resumes exactly. (The library's `enable_jit_checkpoint` may save between a backward pass and
    its update.)

    Attributes:
        signals (`tuple[signal.Signals, ...]`): to listen to, as long as it trains. One that the process was started to
            ignore, as shells start what is in the background, stays ignored.
        received (`bool`): whether the run was told to stop.
        signal (`signal.Signals`): by which; SIGTERM if only another process was told.
        saved_at (`int`): the step of the last checkpoint of this run.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)):
        self.signals = signals
        self.received: bool = False
        self.signal = signal.SIGTERM
        self.saved_at: int | None = None
        self._is_training = False
        self._is_told = False  # this process, and the others perhaps not yet
        self._speaks = False
        self._asked: Readback | bool = False
        self._previous: dict[signal.Signals, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_told:
            raise KeyboardInterrupt
        self._is_told, self.signal = True, signal.Signals(number)
        silence_closed_pipes()  # `… | tee` dies of the same Ctrl-C, and a progress bar would fail before the checkpoint
        if number == signal.SIGINT and self._speaks:  # `print` may be in the middle of another line
            os.write(2, b"\nstopping with a checkpoint after this update or evaluation; Ctrl-C again stops at once\n")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self._is_training, self._speaks = True, state.is_world_process_zero
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in heard}

    def _ask(self, args: TrainingArguments) -> Readback | bool:
        """Whether any process was told to stop. The answer of several is the same in each, and takes its time."""
        if args.world_size == 1:
            return self._is_told
        told = torch.full((), float(self._is_told), device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return Readback(told)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, self._asked = self._asked, self._ask(args)
        self.received = bool(self._asked if args.world_size == 1 else before)
        if self.received:
            after = "the model is saved" if args.save_only_model else "`resume_from_checkpoint` goes on"
            logger.warning("told to stop: %s after step %d", after, state.global_step)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_training:
            self.received = bool(self._ask(args))
            if self.received:
                control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received:  # the checkpoint is saved already
            control.should_save = control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_at = state.global_step

    def on_train_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self.received = bool(self._ask(args))
        self.restore()

    def restore(self) -> None:
        """Give the signals the handlers back that they had before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self._is_training = {}, False


class SeedEachProcess(TrainerCallback):
    """Seeds each of several processes differently; a resumed run then restores the random state of each process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)
