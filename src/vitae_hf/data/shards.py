# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures streamed from parquet or tar shards, whose rows are shared out among processes and their workers.

An epoch is the shards in a new order, one after the other. Each process takes an equal stretch of these rows and gives
it to its workers in whole batches. So every row is seen once, all processes take the same number of steps, and the
place where a run stopped is a number of rows. For that, the number of rows of every shard must be known before the
first epoch.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from typing import Any, ClassVar, Literal

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow.parquet
import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm

from .samples import PictureDataset
from .sources import find_columns, find_data_files, find_image, is_text, load_features, number_or_text


_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""The name of a member of a tar: the sample, a dot, and which part of the sample it is. Other members are left out."""


@dataclass(frozen=True)
class Shards:
    """The files of one split, in order, with how many rows each holds.

    Attributes:
        paths: local paths or URLs that `fsspec` opens, all `.parquet` or all `.tar`.
        rows: of each.
        image: name of the column, or ending in the tar, that holds the picture.
        label: the same for the label; `None`: rows have no `label`.
        classes: the labels that are text, in the order of their numbers; `None`: labels are numbers.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...]
    image: str
    label: str | None
    classes: tuple[str, ...] | None = None

    def read(self, shard: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows `start` to `stop - 1` of a shard: `{"image": {"bytes", "path"}, "label"}`, the picture undecoded."""
        reader = _read_tar if self.paths[shard].endswith(".tar") else read_parquet
        numbers = {text: number for number, text in enumerate(self.classes or ())}
        for row in reader(self.paths[shard], start, stop, self.image, self.label):
            if "label" in row:
                row["label"] = numbers.get(row["label"], row["label"])
            yield row


def find_shards(
    source: str,
    name: str | None = None,
    split: str = "train",
    labelled: bool = True,
    names: list[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Shards:
    """The shards of a split of a Hub data set or local folder.

    The number of rows is in the footer of a parquet file, and for tars in a file beside them ([`written_rows`]).
    Without that file, tars are read through once, which takes long over a network; so does collecting the classes of
    labels that are text, unless `names` are given.

    Args:
        source: as `datasets.load_dataset` takes it.
        name: its configuration, where it has several.
        split: which files.
        labelled: whether to read labels.
        names: of the classes, for labels that are text.
        image_column, label_column: names of columns; see [`find_columns`].

    Raises:
        ValueError: there is no such split, its files are neither all parquet nor all tar, or its columns are not those
            of labelled pictures; the message names what was found.
    """
    files = find_data_files(source, name)
    if split not in files:
        raise ValueError(f"{source} has no files for a split {split!r}; it has {list(files)}")
    paths = tuple(files[split])
    endings = {os.path.splitext(path)[1] for path in paths}
    if endings not in ({".parquet"}, {".tar"}):
        raise ValueError(f"streaming needs parquet or tar shards, got {sorted(endings)} in {source}")
    features = load_features(source, name, split)
    image: str = find_image(features, source, image_column)
    label: str | None = None
    if labelled:
        found = find_columns(features, source, image_column, label_column)
        columns = {role: column for column, role in found.items()}
        image, label = columns["image"], columns["label"]
    written_rows.cache_clear()  # it may say something else than the last time
    with ThreadPoolExecutor(16) as pool:
        progress = {"total": len(paths), "desc": "counting rows", "unit": " shards", "disable": len(paths) < 9}
        rows = tuple(tqdm(pool.map(count_rows, paths), **progress))
        shards = Shards(paths, rows, image, label)
        if labelled and is_text(features[shards.label]):
            texts = names or sorted(set().union(*pool.map(partial(_texts, shards), range(len(paths)))))
            shards = replace(shards, classes=tuple(texts))
    return shards


def _texts(shards: Shards, shard: int) -> set[str]:
    """The labels of a shard."""
    if shards.paths[shard].endswith(".tar"):
        labels = (row["label"] for row in shards.read(shard, 0, shards.rows[shard]))
    else:
        with open_file(shards.paths[shard]) as file:
            labels = pyarrow.parquet.read_table(file, columns=[shards.label])[shards.label].to_pylist()
    return {label for label in labels if label is not None}


def open_file(path: str) -> Any:
    """A file by its path, whatever characters that has, or by its URL."""
    files, inner = fsspec.core.url_to_fs(path)
    return files.open(inner)


def count_rows(path: str) -> int:
    """How many rows a shard has; [`find_shards`] says where that is known from."""
    files, inner = fsspec.core.url_to_fs(path)
    if path.endswith(".parquet"):
        with files.open(inner) as file:
            return pyarrow.parquet.read_metadata(file).num_rows
    folder, file_name = os.path.split(path)
    source, rows = written_rows(folder)
    if rows is None:
        return sum(1 for _ in tar_samples(path))
    if file_name not in rows:
        raise ValueError(f"{source} has no number of rows for {file_name}")
    return rows[file_name]


@lru_cache(maxsize=16)  # there may be thousands of tars, and the network between
def written_rows(folder: str) -> tuple[str, dict[str, int] | None]:
    """The file beside tars that has their numbers of rows, and these by the name of the tar; none if there is none.

    WebDataset writes `sizes.json`, `{"file.tar": rows}`; timm's data sets on the Hub have `_info.json`, with lists
    `filenames` and `shard_lengths` for each split.
    """
    files, inner = fsspec.core.url_to_fs(folder)
    for name in ("sizes.json", "_info.json"):
        if files.exists(f"{inner}/{name}"):
            found = json.loads(files.read_text(f"{inner}/{name}", encoding="utf-8"))
            try:
                rows = found if name == "sizes.json" else _rows_of_timm(found["splits"])
            except (AttributeError, KeyError, TypeError):  # a file of another kind that is called so, too
                continue
            return f"{folder}/{name}", rows
    return folder, None


def _rows_of_timm(splits: dict[str, dict[str, list[Any]]]) -> dict[str, int]:
    pairs = (zip(split["filenames"], split["shard_lengths"]) for split in splits.values())
    return dict(chain.from_iterable(pairs))


def tar_samples(path: str) -> Iterator[Iterator[tuple[re.Match[str], Any]]]:
    """The samples of a tar: successive members whose names are alike up to the first dot, as `(match, file)`."""
    archive = datasets.StreamingDownloadManager().iter_archive(path)
    members = ((match, file) for name, file in archive if (match := _NAME.match(name)))
    return (group for _, group in groupby(members, key=lambda member: member[0][1]))


def _read_tar(path: str, start: int, stop: int, image: str, label: str | None) -> Iterator[dict[str, Any]]:
    for index, group in enumerate(tar_samples(path)):
        if index >= stop:
            return
        if index >= start:
            row: dict[str, Any] = {"image": {"bytes": b"", "path": f"{path}, sample {index}"}}
            if label is not None:
                row["label"] = None
            for match, file in group:
                if match[2] == image:
                    row["image"] = {"bytes": file.read(), "path": f"{path}/{match.string}"}
                elif match[2] == label:
                    row["label"] = number_or_text(file.read())
            yield row


def read_parquet(path: str, start: int, stop: int, image: str, label: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a file, as [`Shards.read`] gives them, but with labels as they are."""
    with open_file(path) as opened:
        file = pyarrow.parquet.ParquetFile(opened)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                columns = [image] if label is None else [image, label]
                batches = file.iter_batches(64, row_groups=[group], columns=columns)
                found = chain.from_iterable(batch.to_pylist() for batch in batches)
                for row in islice(found, max(start - first, 0), stop - first):
                    picture = row[image]
                    yield {
                        "image": {"bytes": picture, "path": None} if isinstance(picture, bytes) else picture,
                        **({} if label is None else {"label": row[label]}),
                    }
            first += rows


class StreamedImageDataset(PictureDataset, IterableDataset[dict[str, Any]]):
    """One split as `{"pixel_values", "labels", "names"}`, streamed: what [`ImageDataset`] is for data in memory.

    A data loader with this `batch_size` gives `batches` batches in an epoch, with any number of workers. If the rows
    cannot be shared out equally, the last process takes rows from the beginning of the epoch again until it has as many
    as the others; torch's `DistributedSampler` does so too. With `drop_last`, rows that do not fill a batch of every
    process are left out; which rows these are differs between epochs.

    Which rows a worker reads depends on the number of processes, the number of workers and the batch size, so a run
    that is resumed in the middle of an epoch needs the same ones.

    A bad picture is treated as in `ImageDataset`, but the last good picture takes the place of a skipped one.

    Args:
        shards: see [`find_shards`].
        transform, on_bad_sample, num_labels: see [`PictureDataset`].
        batch_size: rows per batch and process.
        seed: of the order of shards and rows, and of the transform; these depend on seed, epoch and place alone.
        shuffle_buffer: how many rows a worker holds, undecoded, to draw the next one from; 0: rows stay in order.
        drop_last: see above.
        rank, world_size: number of this process, and how many there are.

    Raises:
        ValueError: with `drop_last`, the rows do not fill one batch of every process.
    """

    deals_rows: ClassVar[bool] = True
    seed: int

    def __init__(
        self,
        shards: Shards,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        batch_size: int,
        on_bad_sample: Literal["error", "skip"] = "error",
        seed: int = 0,
        shuffle_buffer: int = 1000,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_labels: int | None = None,
    ):
        super().__init__(transform, on_bad_sample, seed, num_labels)
        self.shards = shards
        self.batch_size = batch_size
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.world_size = world_size
        self.total: int = sum(shards.rows)
        per_batch = batch_size * world_size
        self.rows: int = self.total // per_batch * batch_size if drop_last else -(-self.total // world_size)
        if not self.rows:
            raise ValueError(
                f"{self.total} rows do not fill one batch of {per_batch}, and `drop_last` leaves out the rest"
            )

    def __len__(self) -> int:
        """Rows that this process sees in an epoch."""
        return self.rows

    @property
    def batches(self) -> int:
        return -(-self.rows // self.batch_size)

    def lane(self, worker: int, workers: int) -> tuple[int, int]:
        """The place in an epoch's rows at which a worker of this process begins, and how many rows its batches take."""
        sizes = [min(self.batch_size, self.rows - batch * self.batch_size) for batch in range(self.batches)]
        counts = [sum(sizes[other::workers]) for other in range(worker + 1)]
        return self.rank * self.rows + sum(counts[:worker]), counts[worker]

    def read_rows(self, epoch: int, start: int, count: int) -> Iterator[dict[str, Any]]:
        """`count` rows of an epoch from a place on; after its last row come its first ones."""
        order = np.arange(len(self.shards.rows))
        if self.shuffle_buffer:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        ends = np.cumsum([self.shards.rows[shard] for shard in order])
        while count > 0:
            start %= self.total
            index = int(np.searchsorted(ends, start, side="right"))
            shard = order[index]
            first = start - (int(ends[index]) - self.shards.rows[shard])
            stop = min(self.shards.rows[shard], first + count)
            yield from self.shards.read(shard, first, stop)
            start, count = start + stop - first, count - (stop - first)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch = self.epoch
        start, count = self.lane(worker, workers)
        rows = self.read_rows(epoch, start, count)
        if self.shuffle_buffer:
            rows = shuffled(rows, self.shuffle_buffer, np.random.default_rng([self.seed, epoch, self.rank, worker]))
        done = min(count, len(range(worker, self.batches_done, workers)) * self.batch_size)
        for _ in islice(rows, done):  # a resumed run has trained these: its data loader drops their batches
            yield {"pixel_values": torch.empty(0), "labels": 0, "names": None}
        for place, (picture, row) in enumerate(self._good(rows), start + done):
            yield self.make_sample(picture, row, row["image"]["path"] or f"row at {place}", epoch, place)

    def _good(self, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[PIL.Image.Image, dict[str, Any]]]:
        """As many readable pictures as there are rows; the last good one takes the place of a bad one."""
        last: tuple[PIL.Image.Image, dict[str, Any]] | None = None
        owed = 0
        for row in rows:
            picture = self.read_picture(row, "a row of the stream")
            owed += 1
            last = last if picture is None else (picture, row)
            if last is not None:
                yield from [last] * owed
                owed = 0
        if owed:
            raise ValueError(f"none of {owed} pictures that one worker was to read can be read")


def shuffled(rows: Iterator[dict[str, Any]], size: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The rows in another order: each is drawn at random from a buffer that holds the next `size` rows."""
    buffer = list(islice(rows, size))
    for row in rows:
        index = generator.integers(size)
        yield buffer[index]
        buffer[index] = row
    yield from (buffer[index] for index in generator.permutation(len(buffer)))
