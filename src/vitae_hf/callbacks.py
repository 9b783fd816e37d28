# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What happens around the steps of a run: progress for people, an end when told, what data and average must know."""

import signal
from types import FrameType

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from .samples import Samples


logger = logging.get_logger(__name__)


class ImageProgress(ProgressCallback):
    """The library's progress bar, counted in images: how many, images per second, and when it will be done."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self.images_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
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
        self._previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            told = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.received = bool(told)
        if self.received:
            logger.warning("told to stop: saving a checkpoint after step %d", state.global_step)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *args, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class TellDatasetEpoch(TrainerCallback):
    """Tells our data sets which epoch begins, and how much of it a resumed run has done."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(self.trainer.train_dataset, Samples):
            accumulated = args.gradient_accumulation_steps
            updates_done = state.global_step % -(-len(train_dataloader) // accumulated)
            self.trainer.train_dataset.set_epoch(int(state.epoch))
            self.trainer.train_dataset.batches_done = updates_done * accumulated


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
