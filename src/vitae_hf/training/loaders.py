# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Data loaders of a run: a resumed run repeats their order, processes share the rows, workers survive a signal."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.samples import PictureDataset, RepeatedAugmentation
from .arguments import ViTAETrainingArguments


DEALING = "dealing.json"
"""File of a checkpoint: what decides which images a worker reads."""


class ImageLoaders(Trainer):
    """The part of [`ViTAETrainer`] that loads data: images in memory, or a stream that deals its rows to the processes.

    Raises:
        ValueError: when training begins: `repeated_augmentation` with a stream, images that do not fill a batch under
            `dataloader_drop_last`, or a checkpoint from the middle of an epoch whose rows were shared out differently.
    """

    args: ViTAETrainingArguments
    train_dataset: Any  # one of this package's data sets, or any other that the library takes
    resumed_from: str | None  # of `WholeCheckpoints`

    @property
    def _deals_rows(self) -> bool:
        return isinstance(self.train_dataset, PictureDataset) and self.train_dataset.deals_rows

    @property
    def _dealing(self) -> dict[str, int]:
        """The numbers that decide which rows of a stream a worker reads, or how many images there are in memory."""
        if not self._deals_rows:
            return {"images": self.num_train_images}
        return {
            "processes": self.args.world_size,
            "workers": self.args.dataloader_num_workers,
            "batch_size": self.args.train_batch_size,
        }

    @property
    def num_train_images(self) -> int:
        """Images of the training split, in all processes together."""
        return getattr(self.train_dataset, "total", len(self.train_dataset))

    def num_examples(self, dataloader: Any) -> int:
        return getattr(dataloader.dataset, "total", None) or super().num_examples(dataloader)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self._deals_rows and self.args.repeated_augmentation > 1:
            raise ValueError("`repeated_augmentation` needs the data in memory: it does not go with streaming")
        batch = self.args.train_batch_size * self.args.world_size
        images = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else batch
        if self.args.dataloader_drop_last and not self._deals_rows and images < batch:
            raise ValueError(
                f"{images} training images do not fill one batch of {batch}, and `dataloader_drop_last` leaves out what"
                " does not: use smaller batches"
            )
        loader = self._get_streaming_dataloader() if self._deals_rows else super().get_train_dataloader()
        # A loader draws the seed of its workers when they start. A resumed run starts them once more, so the draw must
        # not come from the random state of training; `TellDatasetEpoch` seeds it.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return protect_workers(loader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        repeats = self.args.repeated_augmentation
        return RepeatedAugmentation(self.train_dataset, repeats) if repeats > 1 else super()._get_train_sampler()

    def _get_streaming_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=bool(self.args.dataloader_pin_memory),
            persistent_workers=bool(self.args.dataloader_persistent_workers),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,  # since the stream has dealt the rows to the processes already
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.args.dataloader_pin_memory,
        )

    def smallest_batch(self) -> int:
        """Pictures in the smallest batch that a process will train on."""
        batch = self._train_batch_size
        images = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else batch
        batches = -(-images // batch)
        fills_up = self.args.world_size > 1 and self.accelerator.even_batches and not self._deals_rows
        is_reached = self.state.max_steps * self.args.gradient_accumulation_steps >= batches
        if self.args.dataloader_drop_last or fills_up or not is_reached:
            return batch
        return images % batch or batch

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with self._whole_split():
            return protect_workers(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with self._whole_split():
            return protect_workers(super().get_test_dataloader(*args, **kwargs))

    @contextmanager
    def _whole_split(self) -> Iterator[None]:
        """Suspend `dataloader_drop_last`, which is for training: an evaluation must see every image."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if isinstance(self.train_dataset, PictureDataset) and self.args.should_save:
            checkpoint = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            (checkpoint / DEALING).write_text(json.dumps(self._dealing), encoding="utf-8")

    def check_dealing(self) -> None:
        """See that the rows of a stream are shared out as they were in the epoch that the checkpoint interrupted."""
        if self.resumed_from is None or not self._deals_rows:
            return
        saved = Path(self.resumed_from) / DEALING
        if not saved.exists():
            return
        before = json.loads(saved.read_text(encoding="utf-8"))
        if before != self._dealing:
            raise ValueError(
                f"{self.resumed_from} is from a stream dealt to {json.dumps(before)}; resume it so, not with"
                f" {json.dumps(self._dealing)}"
            )


class TellDatasetEpoch(TrainerCallback):
    """Tells our data sets which epoch begins, and how many of its batches a resumed run has done already.

    The workers that read any other data set draw from seeds that depend on the run's, the process and the epoch.
    """

    def __init__(self, trainer: ImageLoaders):
        self.trainer = trainer

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        mixed = np.random.SeedSequence([args.seed, args.process_index, int(state.epoch or 0)]).generate_state(1)
        getattr(train_dataloader, "base_dataloader", train_dataloader).generator.manual_seed(int(mixed[0]))
        if isinstance(self.trainer.train_dataset, PictureDataset):
            accumulated = args.gradient_accumulation_steps
            updates_done = state.global_step % -(-len(train_dataloader) // accumulated)
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))
            done = 0 if args.ignore_data_skip else updates_done * accumulated
            self.trainer.train_dataset.batches_done = done
            if done:
                self.trainer.check_dealing()


def protect_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, with workers that go on after a signal to all processes of the run."""
    base = getattr(loader, "base_dataloader", loader)
    if getattr(base.worker_init_fn, "func", None) is not outlive_signals:  # the library gives a loader again
        base.worker_init_fn = partial(outlive_signals, trainer=os.getpid(), then=base.worker_init_fn)
    return loader


def outlive_signals(worker: int, trainer: int, then: Callable[[int], None] | None = None) -> None:
    """As a data loader's `worker_init_fn`: the worker ignores SIGINT, and a SIGTERM unless the trainer sends it.

    Ctrl-C is a SIGINT to all processes, and torchrun passes a SIGTERM on to all. If the workers died of either,
    training would fail before it can save a checkpoint.

    Args:
        worker: its number.
        trainer: id of the process that trains.
        then: another `worker_init_fn`, called in the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm, args=(trainer,), daemon=True).start()
    if then is not None:
        then(worker)


def _await_sigterm(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
