# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Whether the files of a model are what was published: a flipped byte of weights loads without a word otherwise."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from ..messages import printable


SUMS_NAME = "SHA256SUMS"  # in the format of `sha256sum`, which can check it too


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: Path) -> str:
    """Git's name of a file's content, which the Hub gives to files outside LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_sums(folder: Path, files: list[Path]) -> list[Path]:
    """Write `SHA256SUMS` of a folder's files, whole or not at all, and return them with it."""
    files = [path for path in files if path.name != SUMS_NAME]
    unfinished = folder / f".{SUMS_NAME}.unfinished"
    unfinished.write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
    return [*files, unfinished.replace(folder / SUMS_NAME)]


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as the folder's `SHA256SUMS` has them; none if there is no such file.

    Raises:
        ValueError: a line is no sum and name of a file in the folder.
    """
    sums, path = {}, folder / SUMS_NAME
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line)
        if not match:
            raise ValueError(f"{path} is damaged: expected a SHA-256 and a file name, got {line!r}")
        sums[match[2]] = match[1]
    return sums


def header_problem(path: Path) -> str | None:
    """What keeps the header of a safetensors file from being read, if anything does."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return printable(error, 300)


def problems_of_file(path: Path, expected_sum: str | None) -> list[str]:
    """What is wrong with a file, by its sum, by the name the Hub's cache gave to its content, and by its header."""
    problems = []
    if expected_sum is not None and sha256(path) != expected_sum:
        problems.append(f"its SHA-256 is not the one in {SUMS_NAME}")
    blob = path.resolve().name if path.is_symlink() else ""  # of a cache: a link to a file named by its content
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
) -> dict:
    """Compare every file of a model with its checksums.

    Args:
        source: folder, or name of a Hub repository, of which what is not yet in the cache is downloaded.
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the library's cache.
        token: default: the one that is logged in.

    Returns:
        `folder`; `checked`, the names of files compared with a sum; `unchecked`, those without one; and `problems`: for
        each damaged or missing file what is wrong with it.

    Raises:
        OSError: there is no such folder or repository, or the Hub cannot be reached.
        ValueError: `SHA256SUMS` cannot be read.
    """
    is_folder = Path(source).is_dir()
    folder = Path(source)
    if not is_folder:
        folder = Path(snapshot_download(str(source), revision=revision, cache_dir=cache_dir, token=token))
    sums, problems, checked, unchecked = read_sums(folder), {}, [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        (checked if path.name in sums or path.is_symlink() else unchecked).append(path.name)
        if found := problems_of_file(path, sums.get(path.name)):
            problems[path.name] = found
    if is_folder or not constants.HF_HUB_OFFLINE:  # offline, a cache may hold only what was loaded
        problems |= {name: ["missing"] for name in sums if not (folder / name).exists()}
    return {"folder": str(folder), "checked": checked, "unchecked": unchecked, "problems": problems}
