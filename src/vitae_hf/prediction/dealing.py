# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Which parts a process makes: every part is a fixed slice of the listing, and is one process's.

Parts are called `part-UNIT-SLICE`. A unit is a shard, or as many pictures as a part has. Only a tar must be read to
know how many rows it has, so all its parts are made by one process, in order, and a part of a tar that is not full is
its last.
"""

from collections.abc import Iterator
from itertools import groupby

from ..data.shards import count_rows
from .listing import Listing, Shard, find_image_column, rows_of_parquet, rows_of_tar, why_unreadable
from .parts import Parts, place
from .reading import Item


def part_name(unit: int, number: int = 0) -> str:
    return f"part-{unit:06}-{number:04}"


class Dealing:
    """The parts that a process still has to make, and the pictures of each; iterated once.

    Args:
        listing: of all pictures.
        parts: where they are made.
        rank, world_size: number of this process, and how many there are.

    Attributes:
        done: pictures of this process in parts that were there before.

    Raises:
        ValueError: while iterating: a part that is there has other pictures than the listing.
    """

    def __init__(self, listing: Listing, parts: Parts, rank: int = 0, world_size: int = 1):
        self.listing = listing
        self.parts = parts
        self.rank = rank
        self.world_size = world_size
        self.done = 0

    def __iter__(self) -> Iterator[tuple[str, Iterator[Item]]]:
        unit = -1
        for unit, found in enumerate(self.units()):
            if isinstance(found, list):
                yield from self.of_pictures(unit, found)
            else:
                yield from self.of_tar(unit, found) if found.is_tar else self.of_parquet(unit, found)
        self.see_none_beyond(unit + 1)

    def units(self) -> Iterator[Shard | list[Item]]:
        """Each shard, and the pictures between two shards in lists of a part's size."""
        items: list[Item] = []
        for entry in self.listing:
            if isinstance(entry, Item):
                items.append(entry)
            if items and (isinstance(entry, Shard) or len(items) == self.parts.rows):
                yield items
                items = []
            if isinstance(entry, Shard):
                yield entry
        if items:
            yield items

    def see_none_beyond(self, units: int) -> None:
        beyond = [part for part in self.parts.folder.glob("part-*") if place(part) >= (units,)]
        if beyond:
            raise ValueError(self.parts.has_changed(min(beyond, key=place).stem, "pictures that are no longer there"))

    def is_to_do(self, unit: int, number: int, pictures: list[str]) -> bool:
        """Whether a part is this process's, and is not there yet."""
        if (unit + number) % self.world_size != self.rank:
            return False
        if not self.parts.is_done(part_name(unit, number), pictures):
            return True
        self.done += len(pictures)
        return False

    def of_pictures(self, unit: int, items: list[Item]) -> Iterator[tuple[str, Iterator[Item]]]:
        if self.is_to_do(unit, 0, [item.name for item in items]):
            yield part_name(unit), iter(items)

    def of_parquet(self, unit: int, shard: Shard) -> Iterator[tuple[str, Iterator[Item]]]:
        try:
            column = find_image_column(shard.file, self.listing.image_column)
            rows = count_rows(shard.file)
        except Exception as error:  # pyarrow raises errors of many kinds
            yield from self.of_pictures(unit, [Item(shard.name, None, why_unreadable(shard, error))])
            return
        for number, start in enumerate(range(0, rows, self.parts.rows)):
            stop = min(start + self.parts.rows, rows)
            if self.is_to_do(unit, number, [f"{shard.name}/{row}" for row in range(start, stop)]):
                yield part_name(unit, number), rows_of_parquet(shard, column, start, stop)

    def of_tar(self, unit: int, shard: Shard) -> Iterator[tuple[str, Iterator[Item]]]:
        if unit % self.world_size != self.rank:
            return
        made = 0
        while (names := self.parts.names(part_name(unit, made))) is not None:
            if not names[0].startswith(shard.name):
                raise ValueError(self.parts.has_changed(part_name(unit, made), f"{names[0]}, not of {shard.name}"))
            self.done += len(names)
            if len(names) < self.parts.rows:
                return
            made += 1
        start = made * self.parts.rows
        rows = enumerate(rows_of_tar(shard, start), start)
        for number, group in groupby(rows, key=lambda row: row[0] // self.parts.rows):
            yield part_name(unit, number), (item for _, item in group)
