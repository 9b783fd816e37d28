# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run tells the people who watch it, and how it ends when it is told to."""

import signal
from types import FrameType

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging


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
