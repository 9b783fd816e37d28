# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A folder of results, written part by part, each whole or not at all; the same pictures always make the same part.

So a run that was stopped goes on where parts are missing, and several processes share the parts out without a word to
each other.
"""

import csv
import io
import json
import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ..failures import about
from ..messages import printable
from ..model_folders import read_json


PART_ROWS = 2048
"""Pictures in a part: few enough that a part fits into memory and is lost in seconds on a GPU, and so many that files
are neither small nor too many."""
SETTINGS = "predict.json"
UNFINISHED = ".unfinished"
LONGEST_WRITING = 3600  # seconds
WAY_OUT = "choose another folder, or begin anew by --overwrite"


def place(part: Path) -> tuple[int, ...]:
    """The numbers in the name of a part, which are its place: as text, the millionth would come before the first."""
    return tuple(map(int, re.findall("[0-9]+", part.stem)))


class Parts:
    """A folder of `part-*` files and the `predict.json` that says what they are of.

    Args:
        folder: to write in.
        format: `"parquet"` or `"csv"`.
        rows: pictures in a part.
        embeddings: their dtype; `None`: rows have none.
    """

    def __init__(
        self,
        folder: Path,
        format: str = "parquet",
        rows: int = PART_ROWS,
        embeddings: str | None = None,
    ):
        self.folder = folder
        self.format = format
        self.rows = rows
        columns = {name: pyarrow.string() for name in ("path", "label")}
        columns |= {"score": pyarrow.float32(), "labels": pyarrow.list_(pyarrow.string())}
        columns |= {"scores": pyarrow.list_(pyarrow.float32()), "error": pyarrow.string()}
        if embeddings is not None:
            # Not of a fixed size: pyarrow below 26 cannot read such a list where one is missing.
            columns["embedding"] = pyarrow.list_(pyarrow.from_numpy_dtype(embeddings))
        self.schema = pyarrow.schema(list(columns.items()))

    def begin(self, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Make the folder one of a run with these settings, or see that it is one.

        Args:
            settings: of the run, as JSON has them.
            overwrite: delete what is there of another run.

        Raises:
            ValueError: the folder holds parts of other settings, whose differences the message names, or files of
                another kind.
            OSError: nothing can be written there.
        """
        path = self.folder / SETTINGS
        if overwrite and path.exists():
            for part in self.folder.glob("part-*"):
                part.unlink()
            path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_unfinished()
        content = json.dumps(settings, indent=1)
        first = next(self.folder.glob("part-*"), None)
        if first is not None and not path.exists():
            raise ValueError(f"{self.folder} holds {first.name} and no {SETTINGS}: choose another folder")
        if first is not None:
            self.compare(read_json(path), json.loads(content))
        else:
            self.write_whole(SETTINGS, content.encode() + b"\n")

    def remove_unfinished(self) -> None:
        """Delete what processes have left that were killed as they wrote; other processes may be writing right now."""
        for path in self.folder.glob(f".*{UNFINISHED}"):
            with suppress(FileNotFoundError):  # another process was faster
                if time.time() - path.stat().st_mtime > LONGEST_WRITING:
                    path.unlink()

    def compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        is_same_model = before.get("weights") == now.get("weights")
        ignored = ("version", "model", "revision", "weights") if is_same_model else ("version", "weights")
        changed = [
            f"{name} was {printable(before.get(name))} and is {printable(value)}"
            for name, value in now.items()
            if name not in ignored and before.get(name) != value
        ]
        if not is_same_model and before.get("model") == now.get("model"):
            changed.append("the weights of the model have changed")
        if changed:
            raise ValueError(f"{self.folder} is of another run: {'; '.join(changed)}; {WAY_OUT}")

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.format}"

    def names(self, name: str) -> list[str] | None:
        """The column `path` of a part; `None` if it is not there yet."""
        path = self.path(name)
        if not path.exists():
            return None
        if self.format == "parquet":
            with about(str(path)):
                return pyarrow.parquet.read_table(path, columns=["path"], schema=self.schema)["path"].to_pylist()
        with open(path, newline="", encoding="utf-8") as file:
            return [row["path"] for row in csv.DictReader(file)]

    def is_done(self, name: str, pictures: list[str]) -> bool:
        """Whether a part is there, of these pictures.

        Raises:
            ValueError: it is of other pictures.
        """
        found = self.names(name)
        if found is not None and found != pictures:
            differing = [pair for pair in zip(found, pictures) if pair[0] != pair[1]]
            first = (
                f"{printable(differing[0][0])}, where there now is {printable(differing[0][1])}"
                if differing
                else f"{len(found)} pictures, where there now are {len(pictures)}"
            )
            raise ValueError(self.has_changed(name, first))
        return found is not None

    def has_changed(self, name: str, what: str) -> str:
        return f"the source has changed: {self.path(name)} has {what}; {WAY_OUT}"

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a part, whole or not at all."""
        content = self.as_parquet(rows) if self.format == "parquet" else self.as_csv(rows)
        self.write_whole(self.path(name).name, content)

    def as_parquet(self, rows: list[dict[str, Any]]) -> bytes:
        columns = [
            as_embeddings(rows, field.type)
            if field.name == "embedding"
            else pyarrow.array([row[field.name] for row in rows], field.type)
            for field in self.schema
        ]
        buffer = io.BytesIO()
        table = pyarrow.Table.from_arrays(columns, schema=self.schema)
        pyarrow.parquet.write_table(table, buffer, use_dictionary=["label", "labels.list.element"])
        return buffer.getvalue()

    def as_csv(self, rows: list[dict[str, Any]]) -> bytes:
        """Lists are JSON, in one field."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.schema.names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in plain.items()})
        return text.getvalue().encode()

    def write_whole(self, name: str, content: bytes) -> None:
        # No other process has this name, even if somebody has started the same command twice.
        unfinished = self.folder / f".{name}.{uuid.uuid4().hex}{UNFINISHED}"
        with about(str(self.folder / name)):
            try:
                with open(unfinished, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(self.folder / name)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise


def as_embeddings(rows: list[dict[str, Any]], kind: Any) -> Any:
    """A column of embeddings, some of which may be missing."""
    found = [row["embedding"] for row in rows]
    known = [embedding for embedding in found if embedding is not None]
    values = np.concatenate(known) if known else np.zeros(0, kind.value_type.to_pandas_dtype())
    starts = np.cumsum([0, *(0 if embedding is None else len(embedding) for embedding in found)], dtype=np.int32)
    missing = pyarrow.array([*(embedding is None for embedding in found)])
    return pyarrow.ListArray.from_arrays(starts, pyarrow.array(values, kind.value_type), type=kind, mask=missing)
