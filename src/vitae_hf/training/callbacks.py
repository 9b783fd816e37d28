# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What happens around the steps of a run: progress for people, an end when told, what data and average must know."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from ..data.samples import PictureDataset


logger = logging.get_logger(__name__)


class ImageProgress(ProgressCallback):
    """The library's progress bar, counted in images: how many, images per second, and when it will be done."""

    def on_train_begin(self, args, state, control, **kwargs):
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

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar.update((state.global_step - self.current_step) * self.images_per_step)
            self.current_step = state.global_step


class Throughput(TrainerCallback):
    """Images per second of the updates and of waiting for their data, without evaluating, saving, and the first one.

    Attributes:
        images_per_s (`float`, *optional*): so far; none before the second update.
    """

    def __init__(self):
        self.images, self.seconds, self._since = 0, 0.0, None

    @property
    def images_per_s(self) -> float | None:
        return self.images / self.seconds if self.seconds else None

    def _pause(self, *args, **kwargs):
        if self._since is not None:
            self._since = time.perf_counter()

    on_evaluate = on_save = _pause

    def on_step_end(self, args, *others, **kwargs):
        now = time.perf_counter()
        if self._since is not None:
            self.images += args.global_batch_size
            self.seconds += now - self._since
        self._since = now

    def on_train_begin(self, *args, **kwargs):
        self._since = None


def outlive_sigterm(worker: int, trainer: int, then: Callable[[int], None] | None = None) -> None:
    """As a data loader's `worker_init_fn`: SIGTERM ends the worker only if it comes from the process that trains.

    torchrun, for one, sends it to workers too, whose death would be an error before there is a checkpoint.

    Args:
        worker: its number.
        trainer: process that trains.
        then: another `worker_init_fn`.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm, args=(trainer,), daemon=True).start()
    if then is not None:
        then(worker)


def _await_sigterm(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, as a scheduler sends before it takes a machine back, saves a checkpoint after the update and stops.

    With several processes all of them stop after the same update, whichever were told. Unlike the library's
    `enable_jit_checkpoint`, which may save between a backward pass and its update, the run resumes exactly.

    Attributes:
        received (`bool`): whether the run was told to stop.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)):
        self.signals = signals
        self.received = False
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_train_begin(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _agree(self, args) -> None:
        """Told is told, whichever process it was."""
        if args.world_size > 1:
            told = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.received = bool(told)

    def on_step_end(self, args, state, control, **kwargs):
        self._agree(args)
        if self.received:
            logger.warning("told to stop: saving a checkpoint after step %d", state.global_step)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received:  # and saved already
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, *others, **kwargs):
        self._agree(args)
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class TellDatasetEpoch(TrainerCallback):
    """Tells our data sets which epoch begins, and how much of it a resumed run has done."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(self.trainer.train_dataset, PictureDataset):
            accumulated = args.gradient_accumulation_steps
            updates_done = state.global_step % -(-len(train_dataloader) // accumulated)
            self.trainer.train_dataset.set_epoch(int(state.epoch))
            done = 0 if args.ignore_data_skip else updates_done * accumulated
            self.trainer.train_dataset.batches_done = done
            if done:
                self.trainer.check_dealing()


class SeedEachProcess(TrainerCallback):
    """Gives each of several processes its own random stream; a resumed one then gets its own state back."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)


class AverageWeights(TrainerCallback):
    """Tells the trainer when an update is done, whatever gradient accumulation there is."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, *args, **kwargs):
        self.trainer.start_average()

    def on_step_end(self, *args, **kwargs):
        self.trainer.update_average()
