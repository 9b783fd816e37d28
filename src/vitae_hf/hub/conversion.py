# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The authors' checkpoints: read without running their code, recognised, and renamed tensor by tensor."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..configuration_vitae import ViTAEFamilyConfig
from ..files import whole_folder
from ..image_processing_vitae import ViTAEImageProcessorPil
from ..messages import listed, printable
from ..presets import PRESETS, config_from_preset
from .checksums import sha256, write_sums
from .torch_files import NoTensor, read_torch_file


# Our tensor names -> the authors'. All patterns of a model type are applied, in this order.
_BOTH = [
    (r"^classifier\.", "head."),
    (r"^vitae(?:v2)?\.stages\.(\d+)\.reduction_cell\.", r"layers.\1.RC."),
    (r"^vitae(?:v2)?\.stages\.(\d+)\.normal_cells\.", r"layers.\1.NC."),
    # reduction cell
    (r"(RC)\.(?:pyramid_reduction\.)?convs\.(\d+)\.", r"\1.PRM.convs.\2.0."),
    (r"(RC)\.layernorm_before\.", r"\1.attn.norm1."),
    (r"(RC)\.layernorm_after\.", r"\1.attn.norm2."),
    # normal cell
    (r"(NC\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(NC\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(NC\.\d+)\.attention\.[qkv]_proj\.", r"\1.attn.qkv."),
    (r"(NC\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
]
_CONV_BRANCH = [  # of a normal cell, and of ViTAEv2's reduction cell
    (r"\.conv_branch\.0\.conv\.", ".PCM.0."),
    (r"\.conv_branch\.0\.norm\.", ".PCM.1."),
    (r"\.conv_branch\.1\.conv\.", ".PCM.3."),
    (r"\.conv_branch\.1\.norm\.", ".PCM.4."),
    (r"\.conv_branch\.2\.conv\.", ".PCM.6."),
]
PATTERNS = {
    "vitae": [
        *_BOTH,
        (r"^vitae\.pooler\.layernorm\.", "fc_norm."),
        (r"^vitae\.embeddings\.projection\.", "layers.0.RC.PRM.proj."),
        (r"^vitae\.embeddings\.cls_token$", "layers.0.RC.cls_token"),
        (r"^vitae\.embeddings\.position_embeddings$", "layers.0.RC.pos_embed"),
        (r"(RC)\.attention\.random_projection$", r"\1.attn.w"),
        (r"(RC)\.attention\.[qkv]_proj\.", r"\1.attn.kqv."),
        (r"(RC)\.attention\.o_proj\.", r"\1.attn.proj."),
        (r"(RC)\.mlp\.fc1\.", r"\1.attn.mlp.0."),
        (r"(RC)\.mlp\.fc2\.", r"\1.attn.mlp.2."),
        (r"(RC)\.conv_branch\.0\.conv\.", r"\1.PCM.0."),
        (r"(RC)\.conv_branch\.1\.conv\.", r"\1.PCM.2."),
        (r"(RC)\.conv_branch\.1\.norm\.", r"\1.PCM.3."),
        (r"(RC)\.conv_branch\.2\.conv\.", r"\1.PCM.5."),
        *_CONV_BRANCH,
    ],
    "vitaev2": [
        *_BOTH,
        (r"(RC)\.attention\.[qkv]_proj\.", r"\1.attn.attn.qkv."),
        (r"(RC)\.attention\.o_proj\.", r"\1.attn.attn.proj."),
        (r"(RC)\.mlp\.", r"\1.attn.mlp."),
        *_CONV_BRANCH,
    ],
}
# A table of ViTAEv2's windows that no network reads.
IGNORED = "relative_position_index"


def original_name(name: str, config: ViTAEFamilyConfig) -> str:
    """The authors' name of the tensor that holds our tensor `name` of a classifier with this configuration."""
    if config.has_class_token:  # their plain variants have three stages, of which only the last has normal cells
        name = name.replace("vitae.stages.0.", "vitae.stages.2.")
    for pattern, replacement in PATTERNS[config.model_type]:
        name = re.sub(pattern, replacement, name)
    return name


def original_layout(config: ViTAEFamilyConfig) -> dict[str, dict[str, torch.Size]]:
    """Every tensor of an original checkpoint, and our tensors (name -> shape) that it holds, stacked in this order."""
    with torch.device("meta"):
        ours = AutoModelForImageClassification.from_config(config).state_dict()
    layout = {}
    for name, tensor in ours.items():
        layout.setdefault(original_name(name, config), {})[name] = tensor.shape
    for original, parts in layout.items():
        if fused := re.search(r"\.(kqv|qkv)\.", original):
            order = [f"{letter}_proj" for letter in fused.group(1)]
            layout[original] = dict(sorted(parts.items(), key=lambda part: order.index(part[0].split(".")[-2])))
    return layout


def detect_preset(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Name of the preset that an original state dict belongs to, from its normal cells.

    Raises:
        ValueError: it is none of the variants; the message says what was found.
    """
    cells = {match.groups() for key in state_dict if (match := re.match(r"layers\.(\d+)\.NC\.(\d+)\.", key))}
    first = state_dict.get("layers.2.NC.0.PCM.0.weight")
    first_convolution = None if first is None else tuple(first.shape)
    for name in PRESETS:
        config = config_from_preset(name)
        third = 0 if config.has_class_token else 2  # the authors' third stage, which has cells in every variant
        hidden_size, groups = config.hidden_sizes[third], config.conv_groups[third]
        convolution = (int(config.mlp_ratio * hidden_size), hidden_size // groups, 3, 3)
        depths = (0, 0, *config.depths) if config.has_class_token else config.depths
        expected_cells = {(str(stage), str(cell)) for stage, depth in enumerate(depths) for cell in range(depth)}
        has_class_token = "fc_norm.weight" in state_dict
        if (cells, first_convolution, has_class_token) == (expected_cells, convolution, config.has_class_token):
            return name
    raise ValueError(
        f"these are not the tensors of a ViTAE variant ({len(cells)} normal cells, first convolution"
        f" {first_convolution or 'missing'}); known: {', '.join(PRESETS)}"
    )


def config_from_original(state_dict: Mapping[str, torch.Tensor], preset: str | None = None) -> ViTAEFamilyConfig:
    """The configuration of an original state dict: its preset, with the label count and image size of its tensors.

    Raises:
        ValueError: unknown preset or variant, no classifier, or a position table that is not square.
    """
    preset = preset or detect_preset(state_dict)
    config = config_from_preset(preset)
    if "head.weight" not in state_dict or state_dict["head.weight"].ndim != 2:
        raise ValueError("there is no classifier (a matrix `head.weight`) in this checkpoint")
    num_labels, width = state_dict["head.weight"].shape
    # Of a head that does not fit, rows may be as many as the file has bytes: no classes are named for them.
    overrides = {"num_labels": num_labels} if width == config.hidden_size else {}
    if config.has_class_token and "layers.0.RC.pos_embed" in state_dict:
        if state_dict["layers.0.RC.pos_embed"].ndim != 3:
            raise ValueError("the position table (`layers.0.RC.pos_embed`) must have three dimensions")
        num_patches = state_dict["layers.0.RC.pos_embed"].shape[1] - 1
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise ValueError(
                f"the position table (`layers.0.RC.pos_embed`) has {num_patches} patches, not a square number"
            )
        overrides["image_size"] = side * config.total_stride
    return config_from_preset(preset, **overrides)


def convert_original_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: ViTAEFamilyConfig | None = None
) -> dict[str, torch.Tensor]:
    """Rename the tensors of an original state dict, splitting fused projections. Nothing is resized or left out.

    (But for ViTAEv2's `relative_position_index`, which no network reads.)

    Args:
        state_dict: the authors' names, with or without `module.` before them, -> tensors.
        config: what network it is; default: recognised by [`config_from_original`].

    Returns:
        The state dict of a classifier with that configuration.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; the message names the first ten.
    """
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items() if IGNORED not in name}
    config = config or config_from_original(state_dict)
    layout = original_layout(config)
    problems = [f"missing: {name}" for name in layout if name not in state_dict]
    problems += [f"not expected: {printable(name)}" for name in state_dict if name not in layout]
    converted = {}
    for original, parts in layout.items():
        if original not in state_dict:
            continue
        shape = next(iter(parts.values()))
        expected = (len(parts) * shape[0], *shape[1:]) if shape else ()
        if tuple(state_dict[original].shape) != tuple(expected):
            problems.append(
                f"wrong shape: {original} is {tuple(state_dict[original].shape)}, expected {tuple(expected)}"
            )
            continue
        tensors = state_dict[original].chunk(len(parts)) if len(parts) > 1 else [state_dict[original]]
        converted.update({name: tensor.clone() for name, tensor in zip(parts, tensors)})
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit this network:\n  " + listed(problems, "\n  "))
    return converted


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of one of the authors' `.pth` or `.pth.tar` files without running code from it.

    Takes `state_dict_ema` if there is one, else `state_dict`, `model` or the file itself; drops `module.` prefixes.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no PyTorch file, damaged, asks to run code, or holds no state dict of finite numbers.
    """
    content = read_torch_file(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    is_state_dict = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, (torch.Tensor, NoTensor)) for key, value in content.items()
    )
    if not is_state_dict or not content:
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, at the top or under `state_dict_ema`,"
            " `state_dict` or `model`"
        )
    unusable = {name: problem for name, value in content.items() if (problem := problem_of_weight(value))}
    if unusable:
        names = listed(f"{printable(name)} ({problem})" for name, problem in unusable.items())
        raise ValueError(f"{path} holds what no weight can be: {names}")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def problem_of_weight(value: torch.Tensor | NoTensor) -> str | None:
    """What keeps a value of a state dict from being a weight, if anything does."""
    if isinstance(value, NoTensor):
        return value.problem
    return None if value.isfinite().all() else "not finite"


def read_labels(path: str | Path | None, num_labels: int) -> dict[int, str] | None:
    """Class names by index: from a JSON list, or ImageNet-1k's for 1,000 classes; for other heads there are none.

    Raises:
        ValueError: the file is no JSON list of `num_labels` names.
        ImportError: ImageNet's names are needed and timm, which has them, is not installed.
    """
    if path is not None:
        names = json.loads(Path(path).read_text())
        if not isinstance(names, list) or len(names) != num_labels or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{path} must be a JSON list of {num_labels} class names, one for each output of the classifier"
            )
    elif num_labels == 1000:
        try:
            from timm.data import ImageNetInfo
        except ImportError as error:
            raise ImportError("ImageNet's class names come from timm: `pip install timm`, or pass --labels") from error
        names = ImageNetInfo("imagenet-1k").label_descriptions()
    else:
        return None
    return dict(enumerate(names))


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    preset: str | None = None,
    labels: str | Path | None = None,
    verify: str | Path | None = None,
    write_card: Callable[[Path, dict], None] | None = None,
) -> dict:
    """Write an original checkpoint as a folder for `from_pretrained` and the Hub, whole or not at all.

    Args:
        checkpoint: one of the authors' files.
        output: folder to create.
        preset: which network it is; default: recognised from the tensors.
        labels: JSON list of class names; default: ImageNet-1k's for 1,000 classes, else generic ones.
        verify: image to classify with the reloaded folder.
        write_card: adds a model card to the folder, for which it gets what is returned; default: there will be none.

    Returns:
        The folder, and what was found: name and SHA-256 of the file, preset, parameters, labels, whether these are
        ImageNet-1k's, image size, and the labels of the `verify` image.

    Raises:
        ValueError: as [`load_original_checkpoint`], [`convert_original_state_dict`] and [`verify_folder`] say.
        OSError: `output` exists and is not empty, or a file cannot be read or written.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    state_dict = load_original_checkpoint(checkpoint)
    preset = preset or detect_preset(state_dict)
    config = config_from_original(state_dict, preset)
    if id2label := read_labels(labels, config.num_labels):
        config.id2label, config.label2id = id2label, {name: index for index, name in id2label.items()}
    weights = convert_original_state_dict(
        state_dict, config
    )  # before the model, which costs what the configuration says
    model = AutoModelForImageClassification.from_config(config)
    model.load_state_dict(weights)
    record = {
        "output": str(output),
        "file": Path(checkpoint).name,
        "sha256": sha256(Path(checkpoint)),
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_labels": config.num_labels,
        "is_imagenet_1k": labels is None and config.num_labels == 1000,
        "image_size": config.image_size,
    }
    with whole_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        ViTAEImageProcessorPil(size=config.image_size).save_pretrained(unfinished)
        if write_card is not None:
            write_card(unfinished, record)
        write_sums(unfinished, sorted(unfinished.iterdir()))
        if verify is not None:
            record["verified"] = verify_folder(unfinished, verify)
    return record


@torch.no_grad()
def verify_folder(folder: str | Path, image: str | Path) -> list[dict]:
    """Reload a written folder as its users do and classify one image.

    Returns:
        The five likeliest, as `pipeline` gives them: `{"label": …, "score": …}`.

    Raises:
        ValueError: a logit is not finite, or the image cannot be read.
    """
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits = model(**processor(image, return_tensors="pt")).logits[0]
    if not logits.isfinite().all():
        raise ValueError(f"the converted network gives logits that are not finite for {image}")
    scores, indices = logits.softmax(-1).topk(min(5, logits.numel()))
    return [
        {"label": model.config.id2label[index], "score": round(score, 4)}
        for score, index in zip(scores.tolist(), indices.tolist())
    ]
