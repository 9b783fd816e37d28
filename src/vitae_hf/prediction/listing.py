# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What SOURCEs hold, one picture or shard after the other, in an order that is always the same.

Of a tree of folders, the names in one folder and in those above it are in memory at a time; of a pattern, all that it
finds.
"""

import os
from collections.abc import Iterator
from glob import has_magic, iglob
from itertools import chain, permutations
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from ..data.folders import files_below, kind_of
from ..data.shards import count_rows, open_file, read_parquet, tar_samples
from ..data.sources import choose_image_column, find_data_files, pick_split
from ..failures import first_line
from .reading import Item, is_passing


MOST_LEFT_OUT = 10  # names that are kept, to show which files are no pictures


class Shard(NamedTuple):
    """A parquet or tar file of pictures.

    Attributes:
        name: before the names of its pictures.
        file: path or URL.
    """

    name: str
    file: str

    @property
    def is_tar(self) -> bool:
        return self.file.endswith(".tar")


class Listing:
    """The pictures and shards that sources hold; iterating again begins anew.

    Args:
        sources: pictures, shards, folders with these at any depth, patterns, or data sets of the Hub.
        apart: a folder that is not looked into, in which results are written.
        image_column: of parquet files, where several columns hold pictures.
        dataset_name, split: of data sets of the Hub: the configuration, where there are several, and the only split to
            list; default: all of them.

    Attributes:
        num_left_out: files found so far that are no pictures and no shards.
        left_out: the names of the first of them.

    Raises:
        ValueError: while iterating: a source is none of these; or a configuration or a split was asked for, but it is
            no data set of the Hub; or a column, but it is a tar.
    """

    def __init__(
        self,
        sources: list[str],
        apart: Path | None = None,
        image_column: str | None = None,
        dataset_name: str | None = None,
        split: str | None = None,
    ):
        self.sources = sources
        self.apart = apart
        self.image_column = image_column
        self.dataset_name = dataset_name
        self.split = split
        self.num_left_out = 0
        self.left_out: list[str] = []

    def __iter__(self) -> Iterator[Item | Shard]:
        self.num_left_out, self.left_out = 0, []
        for source in self.sources:
            yield from self.of_source(source)

    def check(self) -> None:
        """See that there is something in every source, and no source in another.

        Raises:
            ValueError: a source is none, holds nothing, or its pictures would have two rows.
        """
        folders = {source: f"{os.path.realpath(source)}{os.sep}" for source in self.sources if os.path.lexists(source)}
        for outer, inner in permutations(self.sources, 2):
            if outer in folders and inner in folders and folders[inner].startswith(folders[outer]):
                raise ValueError(f"{inner} lies in {outer}: its pictures would have two rows")
        for source in self.sources:
            if next(self.of_source(source), None) is None:
                raise ValueError(f"{source} holds no pictures and no parquet or tar files")

    def of_source(self, source: str) -> Iterator[Item | Shard]:
        is_local = os.path.lexists(source) or has_magic(source)
        if is_local and (self.dataset_name or self.split):
            raise ValueError(f"--dataset_name and --split are for data sets of the Hub, and {source} is none")
        if os.path.lexists(source):
            yield from self.below(Path(source), source if len(self.sources) > 1 else "")
        elif has_magic(source):
            for path in sorted(iglob(source, recursive=True)):
                yield from self.matched(path, source)
        else:
            splits = find_data_files(source, self.dataset_name)
            chosen = [pick_split(splits, self.split)] if self.split else splits
            for url in chain.from_iterable(splits[split] for split in chosen):
                name = url.partition("@")[2].partition("/")[2] or url
                yield from self.entry(name if len(self.sources) == 1 else f"{source}/{name}", url)

    def matched(self, path: str, pattern: str) -> Iterator[Item | Shard]:
        """What a pattern matches. One with `**` matches a folder and its files, which are taken by their ending."""
        if "**" not in pattern:
            yield from self.below(Path(path), path)
        elif not os.path.isdir(path) and not self.is_apart(path):
            yield from self.entry(as_text(path), path)

    def is_apart(self, path: str) -> bool:
        """Whether a path leads into the folder that is left out."""
        apart = None if self.apart is None else os.path.realpath(self.apart)
        return apart is not None and os.path.realpath(path).startswith(f"{apart}{os.sep}")

    def below(self, path: Path, name: str) -> Iterator[Item | Shard]:
        """A file that was named, or all files of a folder.

        Args:
            name: put before the names in the folder.
        """
        if not path.is_dir():
            kind = self.shard if kind_of(path) in (".parquet", ".tar") else Item
            yield kind(as_text(str(path)), str(path))
            return
        root, apart = os.path.realpath(path), "" if self.apart is None else os.path.realpath(self.apart)
        for file, problem in files_below(path):
            below = str(file.relative_to(path))
            if apart and f"{root}{os.sep}{below}".startswith(f"{apart}{os.sep}"):
                continue
            found = as_text(os.path.join(name, below))
            if problem is not None:
                why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
                yield Item(found, None, f"cannot read {found}: {why}")
            else:
                yield from self.entry(found, str(file))

    def shard(self, name: str, file: str) -> Shard:
        if self.image_column is not None and file.endswith(".tar"):
            raise ValueError(f"--image_column_name is for parquet files, and {name} has no columns")
        return Shard(name, file)

    def entry(self, name: str, file: str) -> Iterator[Item | Shard]:
        """A file by its ending, if it is a picture or a shard."""
        kind = kind_of(Path(file))
        if kind in (".parquet", ".tar"):
            yield self.shard(name, file)
        elif kind == "pictures":
            yield Item(name, file)
        else:
            self.num_left_out += 1
            self.left_out += [name] if len(self.left_out) < MOST_LEFT_OUT else []


def as_text(path: str) -> str:
    """A path as a column of text can have it: bytes that are not UTF-8 become escapes."""
    return path.encode(errors="backslashreplace").decode()


def find_image_column(file: str, name: str | None = None) -> str:
    """The column of pictures of this name in a parquet file, or the only one: as `datasets` marks it, else of bytes,
    else of bytes and path.

    Raises:
        ValueError: there is none, or there are several and no name is given.
    """
    with open_file(file) as opened:
        schema = pyarrow.parquet.read_schema(opened)
    features = datasets.Features.from_arrow_schema(schema)
    marked = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = marked or [field.name for field in schema if holds_bytes(field.type)]
    return choose_image_column(found, file, dict(zip(schema.names, map(str, schema.types))), name)


def holds_bytes(kind: Any) -> bool:
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def rows_of_parquet(shard: Shard, column: str, start: int, stop: int) -> Iterator[Item]:
    """Pictures `start` to `stop - 1` of a column. Where the shard is damaged, the rows from there on say so."""
    number = start
    try:
        for row in read_parquet(shard.file, start, stop, column, None):
            image = row["image"] or {}
            yield Item(f"{shard.name}/{number}", image.get("bytes") or image.get("path"))
            number += 1
    except Exception as error:  # pyarrow raises errors of many kinds
        why = why_unreadable(shard, error)
        yield from (Item(f"{shard.name}/{rest}", None, why) for rest in range(number, stop))


def rows_of_tar(shard: Shard, start: int) -> Iterator[Item]:
    """The samples from `start` on, of each the first member that is called as a picture is. If the tar is damaged, the
    last row says so."""
    number = 0
    try:
        for members in tar_samples(shard.file):
            if number >= start:
                yield sample_of_tar(shard, members)
            number += 1
        if is_cut(shard.file):
            raise ValueError("the file is cut, and rows after this one are lost")
    except Exception as error:  # tarfile raises errors of many kinds
        why = why_unreadable(shard, error)
        if number != start - 1:  # else the row before `start` is this one
            yield Item(shard.name, None, why)


def sample_of_tar(shard: Shard, members: Iterator[tuple[Any, Any]]) -> Item:
    name, content = "", None
    for match, file in members:
        if content is None and kind_of(Path(match.string)) == "pictures":
            name, content = match.string, file.read()
        name = name or match[1]
    return Item(f"{shard.name}/{name}", content)


def is_cut(file: str) -> bool:
    """Whether a tar ends within a block of 512 bytes, which tarfile takes for its end if it is the block of a name."""
    with open_file(file) as opened:
        is_plain = opened.read(262)[257:] == b"ustar"  # and not compressed
        return is_plain and opened.seek(0, os.SEEK_END) % 512 > 0


def why_unreadable(shard: Shard, error: Exception) -> str:
    """What the row of a damaged shard says.

    Raises:
        Exception: the error itself, if it is not the shard's fault ([`is_passing`]).
    """
    if is_passing(error):
        raise error
    return f"cannot read {shard.name}: {first_line(error)}"


def num_pictures(listing: Listing) -> int | None:
    """How many there are, as far as that is known without reading a tar; `None` if it is not."""
    total = 0
    for entry in listing:
        if isinstance(entry, Item):
            total += 1
        elif entry.is_tar:
            return None
        else:
            try:
                total += count_rows(entry.file)
            except Exception:  # of a damaged shard, which will be told in a row
                total += 1
    return total
