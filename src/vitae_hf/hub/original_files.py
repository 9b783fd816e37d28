# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of the authors, on this machine or on the Hub, and the state dict in it; no code of the file is run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..messages import listed, printable
from .checksums import problems_of_file
from .torch_files import NoTensor, read_torch_file


SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")  # of files with weights
HUB_ADDRESS = re.compile(
    r"hf://(?P<repo_id>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<file>.+))?"
)
WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where a file has them, the averaged ones first


def hub_address(source: str) -> re.Match | None:
    """Where on the Hub a source is; `None` if it is a path.

    Raises:
        ValueError: it begins with `hf://`, but is no such address, or it is one for a browser.
    """
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES) and not Path(source).exists()
    address = HUB_ADDRESS.fullmatch(f"hf://{source}" if is_name else source)
    if address is None and source.startswith("hf://"):
        raise ValueError(f"{source} must be hf://OWNER/NAME, hf://OWNER/NAME/FILE or hf://OWNER/NAME@REVISION/FILE")
    if re.match("https?://", source):
        raise ValueError(
            f"{source} is an address of a page: a file on the Hub is hf://OWNER/NAME/FILE; others, download"
        )
    return address


def choose_file(names: list[str], source: str) -> str:
    """The file of weights among the files of a folder or repository: the only one, or the only safetensors.

    Raises:
        ValueError: there is none, or it is not clear which.
    """
    found = [name for name in names if name.endswith(SUFFIXES)]
    safetensors = [name for name in found if name.endswith(".safetensors")]
    chosen = safetensors if len(safetensors) == 1 else found
    if len(chosen) != 1:
        problem = f"several files of weights, name one of them: {listed(found)}" if found else "no file of weights"
        raise ValueError(f"{source} has {problem}")
    return chosen[0]


def find_checkpoint(source: str | Path) -> Path:
    """The file of a checkpoint, which is downloaded if it is on the Hub.

    Args:
        source: file, or folder with one file of weights; or on the Hub `owner/name` of a repository with one file of
            weights, `hf://owner/name/file` or `hf://owner/name@revision/file`.

    Raises:
        ValueError: it is not clear which file is meant, or the download is damaged.
        OSError or httpx.HTTPError: it cannot be downloaded.
    """
    if Path(source).is_dir():
        files = sorted(path.name for path in Path(source).iterdir() if path.is_file())
        return Path(source) / choose_file(files, str(source))
    address = hub_address(str(source))
    if address is None:
        return Path(source)
    repo_id, revision, file = address.group("repo_id", "revision", "file")
    revision = revision and unquote(revision)
    if file is None:
        files = HfApi().list_repo_files(repo_id, revision=revision)
        file = choose_file(files, f"hf://{repo_id}")
    path = Path(hf_hub_download(repo_id, file, revision=revision))
    if problems := problems_of_file(path, None):
        raise ValueError(
            f"the download of {file} from {repo_id} is damaged: {', '.join(problems)}; delete {path.resolve()}"
        )
    return path


def read_tensors(path: str | Path) -> Any:
    """What is in a file of `torch.save` or a safetensors file.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is damaged or asks to run code.
    """
    if Path(path).suffix != ".safetensors":
        return read_torch_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({printable(error)})") from None


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint of the authors, such as a `.pth` file, without running code from it.

    Takes the averaged weights if there are some, `state_dict_ema` or `model_ema`, else `state_dict`, `model` or the
    file itself; drops `module.` prefixes.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is of neither PyTorch nor safetensors, damaged, asks to run code, or holds no state dict.
    """
    return state_dict_of(read_tensors(path), path)


def weights_in(content: Any) -> list[str]:
    """The keys under which a file has weights, the one that is taken first; none if they are at its top."""
    return [key for key in WEIGHTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]


def state_dict_of(content: Any, path: str | Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    """The weights among what is in a file; see [`load_original_checkpoint`].

    Args:
        weights: the key that they are under; default: the first of [`weights_in`].
    """
    found = weights_in(content)
    if weights is not None and weights not in found:
        raise ValueError(f"{path} has no weights under `{weights}`, but {listed(found) or 'tensors at its top'}")
    if found:
        content = content[weights or found[0]]
    is_state_dict = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, (torch.Tensor, NoTensor)) for key, value in content.items()
    )
    if not is_state_dict or not content:
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, at the top or under `state_dict_ema`,"
            " `model_ema`, `state_dict` or `model`"
        )
    unusable = {name: value.problem for name, value in content.items() if isinstance(value, NoTensor)}
    if unusable:
        names = listed(f"{printable(name)} ({problem})" for name, problem in unusable.items())
        raise ValueError(f"{path} holds what no weight can be: {names}")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}
