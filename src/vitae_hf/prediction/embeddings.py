# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The embeddings in a folder that `vitae predict --embeddings` wrote, read a block at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv, parquet

from ..failures import about
from ..messages import listed
from .parts import place


BLOCK = 16_384
"""Rows that are read at once: of 384 numbers each they are 25 MB in float32."""


class Block(NamedTuple):
    """Some rows of a folder whose pictures could be read.

    Attributes:
        paths (`pyarrow.Array` of shape `(N,)`), labels (the same): of the pictures, as they were written.
        embeddings (`np.ndarray` of shape `(N, C)`): float32.
        left_out (`int`): how many rows between these have an error in the place of an embedding.
    """

    paths: pa.Array
    labels: pa.Array
    embeddings: np.ndarray
    left_out: int


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `predict.json` says of a folder: the model and how it saw the pictures.

    Raises:
        ValueError: the folder has none, or it is damaged.
    """
    file = Path(folder, "predict.json")
    if not file.is_file():
        raise ValueError(f"{folder} has no predict.json: it must be a folder that `vitae predict --embeddings` wrote")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it must be a JSON object")
    return record


def read_blocks(folder: str | Path) -> Iterator[Block]:
    """The rows of a folder part by part, in order, and never more than a block of them in memory.

    Raises:
        ValueError: there are no parts or no embeddings, a part is damaged, or embeddings differ in length or are not
            finite.
    """
    parts = [path for path in Path(folder).glob("part-*") if path.suffix in (".parquet", ".csv")]
    if not parts:
        raise ValueError(f"{folder} has no part-*.parquet or part-*.csv: `vitae predict` writes them")
    width = None
    for part in sorted(parts, key=place):
        with about(str(part)):
            for batch in _read_part(part):
                block = _as_block(batch)
                if len(block.embeddings):
                    width = width or block.embeddings.shape[1]
                    _check(block.embeddings, width)
                yield block


def _read_part(part: Path) -> Iterator[pa.RecordBatch]:
    columns = ["path", "label", "error", "embedding"]
    if part.suffix == ".parquet":
        with parquet.ParquetFile(part, memory_map=True) as file:
            _check_columns(columns, file.schema_arrow.names)
            yield from file.iter_batches(BLOCK, columns=columns)
        return
    # Text that is empty is no value, and an embedding is a list in JSON.
    options = csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    with csv.open_csv(part, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=options) as rows:
        _check_columns(columns, rows.schema.names)
        yield from rows


def _check_columns(wanted: list[str], found: list[str]) -> None:
    if "embedding" not in found:
        raise ValueError("there are no embeddings in it: run `vitae predict` with --embeddings float16")
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"it lacks the columns {', '.join(missing)}; it has {', '.join(found)}")


def _as_block(batch: pa.RecordBatch) -> Block:
    kept = batch.filter(compute.and_(batch["embedding"].is_valid(), batch["error"].is_null()))
    column = kept["embedding"]
    if pa.types.is_string(column.type):
        column = pa.array([json.loads(text) for text in column.to_pylist()], pa.list_(pa.float32()))
    if len(lengths := compute.list_value_length(column).unique()) > 1:
        raise ValueError(f"it has embeddings of {listed(sorted(lengths.to_pylist()))} numbers")
    embeddings = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = lengths[0].as_py() if len(lengths) else 0
    return Block(kept["path"], kept["label"], embeddings.reshape(len(kept), width), len(batch) - len(kept))


def _check(embeddings: np.ndarray, width: int) -> None:
    if embeddings.shape[1] != width:
        raise ValueError(f"it has embeddings of {embeddings.shape[1]} numbers, the parts before it of {width}")
    if bad := int((~np.isfinite(embeddings)).any(1).sum()):
        raise ValueError(f"the embeddings of {bad} pictures are not finite: write them anew, by `--embeddings float32`")
