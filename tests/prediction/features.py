"""A folder as `vitae predict --embeddings` writes it, with what a real model makes of real pictures."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from helpers import DATA
from pyarrow import csv, parquet

from vitae_hf.data.sources import load_labelled_images
from vitae_hf.loading import fingerprint, load_trained


MODEL = "vitae-nano-fashion"


def write_pictures(folder: Path, count: int) -> list[str]:
    """The first test pictures of the example data, each in a folder that is named after its class."""
    split = load_labelled_images(str(DATA), splits=["test"])["test"].select(range(count))
    names, paths = split.features["label"].names, []
    for number, row in enumerate(split):
        paths.append(f"{names[row['label']].replace('/', '-')}/{number:03}.png")
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        (folder / paths[-1]).write_bytes(row["image"]["bytes"])
    return paths


@torch.no_grad()
def embeddings_of(folder: Path, paths: list[str]) -> np.ndarray:
    model, processor = load_trained(MODEL)
    pictures = [PIL.Image.open(BytesIO((folder / path).read_bytes())) for path in paths]
    return model(**processor(pictures, return_tensors="pt")).pooler_output.numpy()


def write_rows(
    folder: Path,
    paths: list[str],
    embeddings: np.ndarray,
    rows_per_part: int = 64,
    format: str = "parquet",
    dtype: str = "float16",
    labels: list[str] | None = None,
) -> Path:
    """Parts with these embeddings. A row that has only NaN has an error in the place of an embedding.

    Lists have a fixed size unless there are such rows: pyarrow before 26 cannot read fixed sizes then.
    """
    folder.mkdir(exist_ok=True)
    bad = np.isnan(embeddings).all(1)
    lists = [None if is_bad else row for is_bad, row in zip(bad, embeddings.astype(dtype))]
    number = pa.from_numpy_dtype(dtype)
    columns = {
        "path": pa.array(paths),
        "label": pa.array(labels or [None] * len(paths), pa.string()),
        "error": pa.array(["cannot read it" if is_bad else None for is_bad in bad], pa.string()),
        "embedding": pa.array(lists, pa.list_(number) if bad.any() else pa.list_(number, embeddings.shape[1])),
    }
    table = pa.table(columns)
    if format == "csv":
        texts = [None if row is None else json.dumps(row) for row in table["embedding"].to_pylist()]
        table = table.set_column(3, "embedding", pa.array(texts, pa.string()))
    for part, start in enumerate(range(0, len(paths), rows_per_part)):
        write = {"csv": csv.write_csv, "parquet": parquet.write_table}[format]
        write(table[start : start + rows_per_part], folder / f"part-{part:05}.{format}")
    return folder


def write_record(folder: Path, **fields) -> None:
    (folder / "predict.json").write_text(json.dumps(fields))


def write_features(root: Path, count: int = 200) -> Path:
    """`root/pictures` and `root/features` with their embeddings by the small model that the package carries."""
    paths = write_pictures(root / "pictures", count)
    write_rows(root / "features", paths, embeddings_of(root / "pictures", paths))
    model, processor = load_trained(MODEL)
    write_record(
        root / "features",
        model=MODEL,
        revision=None,
        weights=fingerprint(model),
        image_size=[64, 64],
        crop_pct=1.0,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        dtype="float32",
        sources=[str(root / "pictures")],
    )
    return root / "features"
