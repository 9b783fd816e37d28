"""Small pictures to predict on, in every kind of source, and the rows that the command wrote of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
from helpers import as_words

from vitae_hf.commands import predict


MODEL = "vitae-nano-fashion"


def picture(number: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (3, 3), np.uint8)
    return PIL.Image.fromarray(pixels).resize((40 + number % 7, 40 + number % 5), PIL.Image.Resampling.BICUBIC)


def content(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def write_folder(folder: Path, numbers: range) -> Path:
    """Pictures in folders of seven."""
    for number in numbers:
        path = folder / f"{number // 7:02}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
    return folder


def write_parquet(path: Path, numbers: range) -> Path:
    image = [{"bytes": content(number), "path": None} for number in numbers]
    pyarrow.parquet.write_table(pa.table({"image": image, "other": list(numbers)}), path, row_group_size=8)
    return path


def write_tar(path: Path, numbers: range) -> Path:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for ending, data in (("json", b"{}"), ("png", content(number))):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def run_predict(*words, output: Path, **options) -> dict:
    """The command in this process, as it is most easily compared: without workers, in float32."""
    given = {"model": MODEL, "num_workers": 0, "dtype": "float32", "batch_size": 4, "rows_per_part": 10}
    return predict.main([*map(str, words), *as_words({**given, "output": output, **options})])


def rows_of(folder: Path) -> list[dict]:
    """All rows, in the order of the parts."""
    return [row for path in sorted(folder.glob("part-*")) for row in pyarrow.parquet.read_table(path).to_pylist()]
