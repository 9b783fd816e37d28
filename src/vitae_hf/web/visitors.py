# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads pictures and loads models that visitors of the web page name. Whatever could be an attack is refused."""

import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_vitae import ViTAEFamilyConfig
from ..failures import first_line
from ..files import find_model
from ..image_processing_vitae import to_rgb
from ..loading import OUR_PROCESSORS, load_trained
from ..model_folders import FAMILY, MODEL_FILES, read_json, weight_files


logger = logging.get_logger(__name__)

MAX_PIXELS = 50_000_000
"""The largest picture: more pixels than most cameras have, 150 MB in memory."""
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
"""The formats that Pillow may decode here. For some of the others it starts programs."""
MOST_TOKENS = 4097
"""How many tokens may attend to each other: those of 1024×1024 pixels in patches of 16×16, and a class token."""
MOST_SCORES = 2**27
"""How many attention weights a cell may have, half a gigabyte."""
DENSE_TYPES = ("rt_detr", "deformable_detr", "mask2former", "vitae_rcnn", "upernet")
"""Kinds of detectors and segmenters that are offered, if this machine has them; nobody can type the name of one on the
Hub."""
MOST_INPUT_PIXELS = 2048**2
"""How many pixels an image processor of theirs may make of a picture."""
SEARCHED_SIDE = 1333
"""To which the longer side of a picture is reduced before they look at it, as is usual for COCO: there may be a mask of
each object or class as large as the picture."""
NARROWEST = 20
"""How many times as long as the shorter side the longer one may be."""
NO_UPLOAD = "This picture is not one that was sent to this page, or not any more: please send it again."


class Refusal(ValueError):
    """A picture or a model is not accepted. The message is shown to the visitor."""


def uploaded_file(file: Any, uploads: Path) -> Path:
    """The path of a file that a request names, if the file was uploaded to this page.

    Args:
        file: what the request contains; it should be a dict with a `path`.
        uploads: folder of uploads; its path contains no links.

    Raises:
        Refusal: it is anything else. The message is always the same, so that it does not tell which files exist.
    """
    try:
        path = Path(os.path.abspath(file["path"]))
        # A path elsewhere is not even looked up, since the time that takes tells something, and some paths hang.
        if path.is_relative_to(uploads):
            path = path.resolve(strict=True)
            if path.is_relative_to(uploads) and path.is_file():
                return path
    except (LookupError, TypeError, ValueError, OSError, RuntimeError):  # RuntimeError if links form a circle
        pass
    raise Refusal(NO_UPLOAD)


def read_picture(path: str) -> tuple[PIL.Image.Image, str]:
    """Read a picture file.

    Returns:
        The picture, upright and in RGB, and a sentence for the visitor if the file is an animation, of which the first
        frame is used.

    Raises:
        Refusal: it is too large or damaged, or no picture.
    """
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise PIL.Image.DecompressionBombError
            is_animated = getattr(picture, "is_animated", False) and picture.format != "MPO"  # a photo and its preview
            return to_rgb(picture), "The picture moves: this is about its first frame." if is_animated else ""
    except PIL.Image.DecompressionBombError:
        raise Refusal(f"This picture has too many pixels: at most {MAX_PIXELS // 10**6} million, please.") from None
    except PIL.UnidentifiedImageError:
        raise Refusal(
            "This file is not a picture that can be read here (PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF)."
        ) from None
    except Exception:  # the plugins of Pillow raise errors of every kind
        raise Refusal("This picture is damaged: it cannot be read to its end.") from None


def problem_of_config(folder: Path) -> str | None:
    """Why the model in a folder cannot be used on this page; `None` if it can."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return "has no configuration that can be read"
    architectures = config.get("architectures")
    if config.get("model_type") in DENSE_TYPES:
        backbone = config.get("backbone_config")
        is_ours = isinstance(backbone, dict) and backbone.get("model_type") in FAMILY
        return None if is_ours else "has a backbone that is no ViTAE or ViTAEv2"
    if config.get("model_type") not in FAMILY:
        return "is no ViTAE or ViTAEv2"
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return None if isinstance(name, str) and name.endswith("ForImageClassification") else "is no classifier"


def is_dense(folder: Path) -> bool:
    """Whether the model in a folder is a detector or a segmenter. Its configuration must be one that can be read."""
    return read_json(folder / "config.json").get("model_type") in DENSE_TYPES


def reduced(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in which a detector or segmenter looks, which is smaller if it is a large one.

    Raises:
        Refusal: it is too narrow.
    """
    if max(picture.size) > NARROWEST * min(picture.size):
        raise Refusal(f"This picture is too narrow: at most {NARROWEST} times as long as wide, please.")
    picture.thumbnail((SEARCHED_SIDE, SEARCHED_SIDE))
    return picture


def check_dense(model: PreTrainedModel, processor: Any) -> None:
    """Raise an error if an image processor cannot prepare pictures for a detector or a segmenter on this page.

    Raises:
        ValueError: it makes too many pixels, sets no bound for the longer side, or has no classes for pixels.
    """
    sides = [side for side in dict(processor.size or {}).values() if side]
    if len(sides) != 2:
        raise ValueError(f"its image processor sets no bound for the longer side: {processor.size}")
    if math.prod(sides) > MOST_INPUT_PIXELS:
        raise ValueError(
            f"its image processor makes pictures of more than {MOST_INPUT_PIXELS:,} pixels: {processor.size}"
        )
    if model.config.model_type == "upernet" and not hasattr(processor, "post_process_semantic_segmentation"):
        raise ValueError(f"its image processor, a {type(processor).__name__}, is none for segmentation")


def check_cost(config: ViTAEFamilyConfig, height: int, width: int) -> None:
    """Raise an error if explaining pictures of this size would take too much memory.

    An explanation computes the attention weights of every cell as a matrix, tokens by tokens.

    Raises:
        ValueError: the network cannot take this size, or it is too large.
    """
    if height % config.total_stride or width % config.total_stride:
        raise ValueError(f"its pictures of {height}×{width} pixels are no multiples of {config.total_stride}")
    stride, windows = 1, getattr(config, "window_sizes", (None,) * config.num_stages)
    for stage, window in enumerate(windows):
        stride *= config.strides[stage]
        rows, columns = height // stride, width // stride
        tokens = rows * columns + 1 if window is None else window**2
        parts = 1 if window is None else math.ceil(rows / window) * math.ceil(columns / window)
        heads = config.num_attention_heads[stage] if config.depths[stage] else 0
        if config.model_type == "vitaev2":
            heads = max(heads, config.reduction_num_attention_heads[stage])
        if heads and (tokens > MOST_TOKENS or parts * heads * tokens**2 > MOST_SCORES):
            raise ValueError(
                f"its pictures of {height}×{width} pixels make {tokens:,} tokens that attend to each other"
            )


def could_be_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@lru_cache(maxsize=32)
def download(name: str, token: bool | None) -> Path:
    """Download the configuration and safetensors of a Hub model, and nothing else, and return their folder.

    Args:
        token: `None` uses this machine's Hub token, for names that its owner gave; `False` does not, for names that
            visitors type.

    Raises:
        Refusal: there is no such model, or it cannot be used on this page.
    """
    try:
        folder = Path(hf_hub_download(name, "config.json", token=token)).parent
        if problem := problem_of_config(folder):
            raise Refusal(f"{name} {problem}.")
        if is_dense(folder) and token is False:  # the size of its network is not compared with its weights
            raise Refusal(f"{name} is no classifier, and this page takes others only from the machine that serves it.")
        commit = folder.name  # the repository may have changed since
        return Path(snapshot_download(name, revision=commit, allow_patterns=MODEL_FILES, token=token))
    except RepositoryNotFoundError:
        raise Refusal(f"There is no model {name} on the Hub, or it is not public.") from None
    except LocalEntryNotFoundError:
        raise Refusal(f"{name} is not on this machine, and the Hub cannot be reached.") from None
    except EntryNotFoundError:
        raise Refusal(f"{name} on the Hub has no config.json: it is no model of Transformers.") from None
    except (OSError, httpx.HTTPError) as error:
        logger.warning("%s: %s", name, error)
        raise Refusal(f"{name} cannot be fetched from the Hub now.") from None


@lru_cache(maxsize=3)
def load_folder(folder: Path, changed: float) -> tuple[PreTrainedModel, Any]:
    """Load the model and image processor of a folder, from safetensors only and without running code in the folder.

    Args:
        changed: when the weights were written. A new value makes the cache load the folder again.

    Raises:
        ValueError: model and processor do not fit each other, or it would take too much memory.
    """
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    if is_dense(folder):
        model, processor = load_trained(folder, dense=True, **options)
        check_dense(model, processor)
        return model, processor
    model, processor = load_trained(folder, **options)
    if not isinstance(processor, OUR_PROCESSORS) or not processor.do_resize:
        raise ValueError("its image processor is none of ViTAE's, or does not resize")
    config: Any = model.config
    check_cost(config, processor.size["height"], processor.size["width"])
    return model, processor


class Models:
    """The models that visitors can choose. What a visitor types is never taken as a path.

    Args:
        named: folders and Hub names to offer, the default first.
        root: a folder. The classifiers, detectors and segmenters one or two levels below it are offered too.
        hub_names: whether visitors can type other Hub names.

    Raises:
        ValueError: an entry of `named` is neither a folder with a model for this page nor a possible Hub name.
    """

    def __init__(self, named: Sequence[str] = (), root: Path | None = None, hub_names: bool = False):
        for name in named:
            folder = Path(find_model(name))
            problem = problem_of_config(folder) if folder.is_dir() else None
            if problem or not (folder.is_dir() or could_be_hub_name(name)):
                raise ValueError(f"{name} {problem or 'is neither a folder nor a Hub name (organisation/model)'}")
        self.named: list[str] = list(named)
        self.root = root
        self.hub_names = hub_names

    def folders(self) -> dict[str, Path]:
        """The folders that are offered, by the names that visitors see, the latest training first."""
        found = {name: Path(find_model(name)) for name in self.named if Path(find_model(name)).is_dir()}
        if self.root is None:
            return found
        configs = [*self.root.glob("*/config.json"), *self.root.glob("*/*/config.json")]
        configs = [path for path in configs if path.is_file()]  # not a link that leads nowhere
        for config in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
            if problem_of_config(config.parent) is None:
                found.setdefault(str(self.root.name / config.parent.relative_to(self.root)), config.parent)
        return found

    def names(self) -> list[str]:
        """The names of all models that are offered, the default first."""
        return list(dict.fromkeys([*self.named, *self.folders()]))

    def load(self, name: str | None) -> tuple[PreTrainedModel, Any]:
        """Load the model of this name, and its image processor.

        Raises:
            Refusal: no model of this name is offered, or it cannot be used.
        """
        if not isinstance(name, str) or not name:
            raise Refusal("Choose a model first.")
        folder = self.folders().get(name)
        if folder is None:
            is_named = name in self.named
            if not is_named and not (self.hub_names and could_be_hub_name(name)):
                hint = "a Hub name looks like organisation/model" if self.hub_names else "choose one from the list"
                raise Refusal(f"There is no model “{name[:100]}” here: {hint}.")
            folder = download(name, token=None if is_named else False)
        try:
            weights = weight_files(folder)
            if not weights:
                raise ValueError("no weights in safetensors, the only format that is read here")
            return load_folder(folder, max(path.stat().st_mtime for path in weights))
        except (OSError, ValueError) as error:  # the library's error for a processor that is missing is an `OSError`
            sentence = first_line(error).replace(str(folder), name).rstrip(".")
            raise Refusal(f"{name} cannot be used: {sentence}.") from None
