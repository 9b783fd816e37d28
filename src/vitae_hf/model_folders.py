# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Checks model folders of strangers: before a network is built, its configuration is compared with the weights.

A configuration can describe a network of any size, but the weights beside it have the size that they have. The checks
read `config.json` and the headers of the safetensors, which name every tensor and its shape, and no weights. Only
[`not_finite`] looks at weights, those of a model that is loaded.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageClassification

from .configuration_vitae import ViTAEConfig, ViTAEFamilyConfig
from .configuration_vitaev2 import ViTAEv2Config
from .messages import listed, printable


MOST_JSON = 8 * 2**20  # bytes of a JSON file; the names of ImageNet-21k's classes take two million
MOST_HEADER = 8 * 2**20  # bytes of a safetensors header
MOST_TENSORS = 20_000  # of a network; the largest variant has 2,000
MOST_STAGES = 32  # each halves the picture at least
MOST_CONVOLUTIONS = 1000  # of all reduction cells
MOST_LABELS = 100_000  # of a configuration whose weights have no classifier to compare with
MOST_SETTINGS = 2**16  # letters of a configuration without the names of the classes
MOST_REACH = 64  # pixels of a dilation or side of a window: the shapes of the weights do not tell these
MODEL_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]
FAMILY = {config.model_type: config for config in (ViTAEConfig, ViTAEv2Config)}
# Fields of a `config.json` that make the library read other files than those that are checked here.
REDIRECTIONS = ("configuration_files", "transformers_weights")
CELL = re.compile(r"(.*\bstages\.([0-9]{1,5})\.normal_cells\.)([0-9]{1,5})(\..*)")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, it has more than `MOST_JSON` bytes, or it holds no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, or no file")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, at most {MOST_JSON:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON that can be read") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: one, or those that an index names; the list may be empty.

    Raises:
        ValueError: the index cannot be read, or names a file that is not in the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and all(map(is_name, shards.values())) else set()
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks weights that its index names: {listed(missing)}")
    if not names:
        raise ValueError(f"{index} names no safetensors of its folder")
    return [folder / name for name in sorted(names)]


def is_name(value: object) -> bool:
    """Whether it is the name of a file, without a folder."""
    return isinstance(value, str) and value == Path(value).name


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by name.

    Raises:
        ValueError: it is not a safetensors file, or its header has more than `MOST_HEADER` bytes.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise ValueError(f"{path} has a header of {size:,} bytes, at most {MOST_HEADER:,} are read")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file ({printable(error)})") from None


def check_model(folder: str | Path) -> None:
    """See that a folder's weights are those of the network that its configuration describes, before it is built.

    Of models of other families, only the number of classes is compared, for which the library makes a name each. Some
    tensors of a network may be missing, as those of a new classifier; whoever loads it decides about that.

    Args:
        folder: where `save_pretrained` wrote a model of any task, or adapters to one.

    Raises:
        ValueError: the configuration or the weights cannot be read, or do not fit each other.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(base, str) and (Path(base) / "config.json").is_file():
            check_model(base)
        return
    fields = read_json(folder / "config.json")
    files = weight_files(folder)
    header = {name: shape for path in files for name, shape in read_header(path).items()}
    is_family = fields.get("model_type") in FAMILY
    if not files and not is_family:
        return  # its weights are in another format
    if not header:
        raise ValueError(f"{folder} has {'weights without tensors' if files else 'no weights in safetensors'}")
    check_labels(folder, fields, header)
    if is_family:
        check_network(folder, fields, header)


def check_labels(folder: Path, fields: dict[str, Any], header: dict[str, tuple[int, ...]]) -> None:
    """Compare the number of classes with the tensors, before the library makes a name for each class."""
    num_labels, rows = fields.get("num_labels"), max(max(shape, default=0) for shape in header.values())
    if num_labels is not None and not (isinstance(num_labels, int) and 0 <= num_labels <= rows):
        raise ValueError(f"{folder} claims {printable(num_labels)} classes, but its weights have at most {rows} rows")
    names = fields.get("id2label")
    if names is None or fields.get("model_type") not in FAMILY:
        return
    if isinstance(names, dict) and len(names) > (header.get("classifier.weight") or (MOST_LABELS,))[0]:
        raise ValueError(f"`id2label` of {folder} has {len(names):,} names, more than its weights have classes")
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))):
        raise ValueError(f"`id2label` of {folder} must have a name for each class, by its number from 0 on")
    if unnamed := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"`id2label` of {folder} must have texts for names, got {listed(unnamed)}")


def check_network(folder: Path, fields: dict[str, Any], header: dict[str, tuple[int, ...]]) -> None:
    """See that a configuration of this family reads no other files and describes the network of the weights.

    Raises:
        ValueError: it does not.
    """
    if found := [name for name in REDIRECTIONS if name in fields]:
        raise ValueError(f"the configuration of {folder} has {listed(found)}, which leads to other files")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"`architectures` of {folder} must be names, got {printable(architectures)}")
    settings = str({name: value for name, value in fields.items() if name not in ("id2label", "label2id")})
    if len(settings) > MOST_SETTINGS:
        raise ValueError(
            f"the configuration of {folder} has {len(settings):,} letters, at most {MOST_SETTINGS:,} are read"
        )
    if "/" in str(fields.get("attn_implementation", fields.get("_attn_implementation"))):
        raise ValueError(f"the configuration of {folder} asks for code from elsewhere as `attn_implementation`")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{folder} has {len(header):,} tensors, more than {MOST_TENSORS:,}")
    try:
        config = FAMILY[fields["model_type"]].from_dict(dict(fields))
        shapes = shallow_shapes(config)
    except Exception as error:  # the library raises errors of every kind about values of a wrong type
        raise ValueError(f"the configuration of {folder} describes no network: {reason_of(error)}") from None
    compare(folder, shapes, config, header)


def reason_of(error: BaseException) -> str:
    """The line of an error that says what is wrong: the last of an error about a configuration, the first of others."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if isinstance(error, StrictDataclassError) else lines[0]
    return printable(line.strip().removeprefix("ValueError: "), 300)


def shallow_shapes(config: ViTAEFamilyConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a classifier, by name, of which each stage has few normal cells; no memory is allocated for it.

    The normal cells of a stage have the same shapes, so one stands for any number of them: the first, or beside cells
    with windows the second for those that attend to all tokens.

    Raises:
        ValueError: it has more stages or convolutions, or a larger dilation or window, than any network of this family.
    """
    convolutions = sum(map(len, config.reduction_dilations))
    if config.num_stages > MOST_STAGES or convolutions > MOST_CONVOLUTIONS:
        raise ValueError(f"{config.num_stages} stages and {convolutions} dilations")
    windows = config.window_sizes if isinstance(config, ViTAEv2Config) else (config.window_size,)
    reaches = [reach for reach in windows if reach is not None]
    if (reach := max(sum(config.reduction_dilations, tuple(reaches)), default=1)) > MOST_REACH:
        raise ValueError(f"dilations and windows may be {MOST_REACH} at most, got {reach}")
    shallow = copy.deepcopy(config)
    shallow.depths = tuple(min(depth, 1) for depth in config.depths)
    if global_cells(config):
        shallow.depths, shallow.global_attn_indexes = (2,), (1,)
    if getattr(config, "rescaled_cells", ()):
        shallow.rescaled_cells = (-1,)
    shallow.frozen_stages = 0
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(shallow)
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def global_cells(config: ViTAEFamilyConfig) -> set[int]:
    """The cells that attend to all tokens where others have windows."""
    return set(getattr(config, "global_attn_indexes", ()))


def compare(
    folder: Path, shapes: dict[str, Any], config: ViTAEFamilyConfig, header: dict[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of the weights with the network of a configuration.

    Args:
        folder: for messages.
        shapes: of [`shallow_shapes`].
        header: shapes of the tensors of the weights, by name.

    Raises:
        ValueError: a tensor has another shape, or more than half of the network's tensors are missing.
    """
    whole = global_cells(config)
    expected, found, misfits = 0, 0, []
    for name in shapes:
        cell = CELL.fullmatch(name)
        expected += 1 if cell is None else len(whole) if cell[3] == "1" else config.depths[int(cell[2])] - len(whole)
    for name, shape in header.items():
        first = name.removeprefix(f"{config.model_type}.")
        if cell := CELL.fullmatch(first):
            stage, index = int(cell[2]), int(cell[3])
            if stage < len(config.depths) and index < config.depths[stage]:
                first = f"{cell[1]}{int(index in whole)}{cell[4]}"
        if first in shapes:
            found += 1
            if shapes[first] != shape:
                misfits.append(f"{printable(name)} is {shape}, expected {shapes[first]}")
    if 2 * found < expected:
        raise ValueError(f"{folder} has {found:,} of the {expected:,} tensors that its configuration describes")
    if misfits and getattr(config, "quantization_config", None) is None:
        raise ValueError(f"the weights of {folder} do not fit its configuration: {listed(misfits)}")


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the weights and saved buffers that hold NaN or infinity in this process's shards of them."""
    local = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in model.state_dict().items()}
    local = {name: tensor for name, tensor in local.items() if tensor.is_floating_point() and not tensor.is_meta}
    if not local:
        return []
    device = next(iter(local.values())).device
    is_finite = torch.stack([tensor.isfinite().all().to(device, non_blocking=True) for tensor in local.values()])
    return [name for name, good in zip(local, is_finite.tolist()) if not good]
