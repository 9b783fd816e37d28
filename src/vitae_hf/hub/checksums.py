# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Are the files of a model those that were published? Without this check, weights with a flipped byte load silently."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from ..files import write_text
from ..messages import printable


SUMS_NAME = "SHA256SUMS"  # in the format of `sha256sum`, which can check it too


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: Path) -> str:
    """Git's name of a file's content; the Hub's cache calls files so that are not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_sums(folder: Path, files: list[Path]) -> list[Path]:
    """Write a `SHA256SUMS` of these files of a folder, whole or not at all.

    Returns:
        The files, and `SHA256SUMS` itself.
    """
    files = [path for path in files if path.name != SUMS_NAME]
    write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), folder / SUMS_NAME)
    return [*files, folder / SUMS_NAME]


def read_sums(folder: Path) -> dict[str, str]:
    """The lines of a folder's `SHA256SUMS`, as SHA-256 by file name; none if it has no such file.

    Raises:
        ValueError: a line is not a SHA-256 and a file name.
    """
    sums, path = {}, folder / SUMS_NAME
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else []:
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line)
        if not match:
            raise ValueError(f"{path} is damaged: expected a SHA-256 and a file name, got {line!r}")
        sums[match[2]] = match[1]
    return sums


def header_problem(path: Path) -> str | None:
    """Why the header of a safetensors file cannot be read; `None` if it can."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return printable(error, 300)


def problems_of_file(path: Path, expected_sum: str | None) -> list[str]:
    """What is wrong with a file.

    Args:
        expected_sum: from `SHA256SUMS`. A file in the Hub's cache is also compared with the Hub's own sum of it, and
            the header of a safetensors file is read.
    """
    problems = []
    if expected_sum is not None and sha256(path) != expected_sum:
        problems.append(f"its SHA-256 is not the one in {SUMS_NAME}")
    blob = path.resolve().name if path.is_symlink() else ""  # the cache links to a file whose name is the Hub's sum
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        problems.append("its SHA-256 is not the Hub's")
    if re.fullmatch("[0-9a-f]{40}", blob) and git_sha1(path) != blob:
        problems.append("its git SHA-1 is not the Hub's")
    if path.suffix == ".safetensors" and (problem := header_problem(path)):
        problems.append(f"no safetensors file ({problem})")
    return problems


def verify_checkpoint(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Compare every file of a model with its checksums, those of its folders too.

    Args:
        source: folder, or name of a Hub repository, whose files are downloaded if they are not in the cache.
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the library's cache.
        token: default: the one that is logged in.

    Returns:
        `folder`; `checked`, the names of the files that have a sum; `unchecked`, of those that have none; and
        `problems`, by the name of a damaged or missing file what is wrong with it.

    Raises:
        OSError: there is no such folder or repository, or the Hub cannot be reached.
        ValueError: `SHA256SUMS` cannot be read.
    """
    is_folder = Path(source).is_dir()
    folder = Path(source)
    if not is_folder:
        folder = Path(snapshot_download(str(source), revision=revision, cache_dir=cache_dir, token=token))
    sums = read_sums(folder)
    problems: dict[str, list[str]] = {}
    checked: list[str] = []
    unchecked: list[str] = []
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parent.parts):  # as `.git`
            continue
        (checked if name in sums or path.is_symlink() else unchecked).append(name)
        if found := problems_of_file(path, sums.get(name)):
            problems[name] = found
    if is_folder or not constants.HF_HUB_OFFLINE:  # offline, the cache may have only those files that were loaded
        problems |= {name: ["missing"] for name in sums if not (folder / name).exists()}
    return {"folder": str(folder), "checked": checked, "unchecked": unchecked, "problems": problems}
