# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A run from pictures to parts: its progress, and what it says in the end about itself."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from typing import Any

from tqdm.auto import tqdm

from .dealing import Dealing
from .listing import num_pictures
from .parts import Parts
from .reading import chunks, read
from .rows import Predictor


class Run:
    """Makes the parts that a process has to make.

    Args:
        predictor: the model.
        dealing: what is to be done.
        parts: where it is written.

    Attributes:
        pictures, errors, num_parts: made by this run.
        first_error: of a picture.
    """

    def __init__(self, predictor: Predictor, dealing: Dealing, parts: Parts):
        self.predictor = predictor
        self.dealing = dealing
        self.parts = parts
        self.pictures = self.errors = self.num_parts = 0
        self.first_error: str | None = None

    def __call__(self, batch_size: int, num_workers: int, runners: int = 1, draft: bool = False) -> dict[str, Any]:
        """Make them all; parts are written while the next ones are computed.

        Args:
            batch_size, num_workers: see [`predict`].
            runners: see [`Predictor.run`].
            draft: see [`PictureReader`].

        Returns:
            Figures of the run, for a JSON record.
        """
        is_gpu = self.predictor.model.device.type == "cuda"
        batches = read(self.predictor.processor, chunks(self.dealing, batch_size), num_workers, is_gpu, draft)
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []
        writing: Future[None] | None = None
        progress = tqdm(desc="prediction", unit=" pictures", disable=self.dealing.rank != 0)
        with progress, ThreadPoolExecutor(1) as writer:
            count_ahead(self.dealing, progress)
            for batch, found in self.predictor.run(batches, runners):
                rows += found
                self.count(found, progress)
                if batch.is_last:
                    self.wait_for(writing)
                    writing, rows = writer.submit(self.parts.write, batch.part, rows), []
                    self.num_parts += 1
            self.wait_for(writing)
        return self.figures(time.perf_counter() - started, num_workers, runners)

    def count(self, rows: list[dict[str, Any]], progress: tqdm) -> None:
        errors = [row["error"] for row in rows if row["error"] is not None]
        self.first_error = self.first_error or next(iter(errors), None)
        self.pictures += len(rows)
        self.errors += len(errors)
        progress.initial = self.dealing.done
        progress.n = self.dealing.done + self.pictures
        progress.set_postfix(errors=self.errors, refresh=False)
        progress.update(0)

    def wait_for(self, writing: Future[None] | None) -> None:
        started = time.perf_counter()
        if writing is not None:
            writing.result()
        self.predictor.seconds.writing += time.perf_counter() - started

    def figures(self, seconds: float, num_workers: int, runners: int) -> dict[str, Any]:
        where = self.predictor.seconds
        of_workers = "reading" if where.reading > where.decoding else "decoding"
        busy = (where.reading + where.decoding) / max(1, num_workers)
        busy_by = {of_workers: busy, "model": where.model / max(1, runners), "writing": where.writing}
        return {
            "pictures": self.pictures,
            "errors": self.errors,
            "done_before": self.dealing.done,
            "left_out": self.dealing.listing.num_left_out,
            "parts": self.num_parts,
            "images_per_s": round(self.pictures / seconds, 1),
            "seconds": {name: round(value, 2) for name, value in {"total": seconds, **asdict(where)}.items()},
            "limit": max(busy_by, key=lambda name: busy_by[name]) if self.pictures else None,
            "num_workers": num_workers,
            "runners": runners,
        }


def count_ahead(dealing: Dealing, progress: tqdm) -> None:
    """Count the pictures in a thread of its own, so that the progress bar tells how long it will take."""
    listing = dealing.listing

    def count() -> None:
        with suppress(Exception):  # which the run itself will meet
            total = num_pictures(copy(listing))
            progress.total = None if total is None else -(-total // dealing.world_size)

    if not progress.disable:
        threading.Thread(target=count, daemon=True).start()
