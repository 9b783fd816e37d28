# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The kinds of checkpoint that people hold: told by the names of their tensors, then made into a network or refused."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from ..configuration_vitae import ViTAEFamilyConfig
from ..configuration_vitaev2 import ViTAEv2Config
from ..messages import listed, printable
from ..presets import PRESETS, config_from_preset
from .original_names import AutoClass
from .upernet import find_heads, upernet_config


MOST_GROUPS = 20  # of names, in a record
# What is before the first cell of a ViTAE, in the authors' names or in ours, is before all its tensors.
FIRST_CELL = re.compile(r"(.+\.)?(?=layers\.0\.RC\.|blocks\.0\.PCM\.|stages\.0\.(?:reduction_cell|normal_cells)\.)")
ROW_POSITIONS = re.compile(r"blocks\.(\d+)\.attn\.rel_pos_h$")
NORMAL_CELL = re.compile(r"(?:layers\.(\d+)\.NC|blocks)\.(\d+)\.")


class Checkpoint(NamedTuple):
    """The tensors of a file, told apart.

    Args:
        kind: what they look like.
        tensors: those of the network, by the authors' names without prefix.
        never_read: those that are among them although no network reads them.
        left_aside: for each tensor beside them, what it belongs to, such as the head of a detector.
        rescaled_cells: after which cells of a plain backbone its maps are taken, if that is known.
        heads: those of the heads of a UperNet beside the backbone, by the names that mmsegmentation gives them.
        had_classifier: whether the network was a classifier's, even if the classifier was left aside.
    """

    kind: "Kind"
    tensors: dict[str, torch.Tensor]
    never_read: dict[str, torch.Tensor]
    left_aside: list[str]
    rescaled_cells: tuple[int, ...] | None = None
    heads: dict[str, torch.Tensor] = {}
    had_classifier: bool = False

    def network(self, preset: str | None = None, window_padding: str | None = None) -> "Network":
        """What it becomes; the message of a `ValueError` says why it cannot."""
        assert self.kind.network is not None  # [`kind_of`] refuses the others
        network = self.kind.network(self, preset, window_padding)
        if not self.heads:
            return network
        config = upernet_config(self.heads, network.config)
        return network._replace(config=config, auto_class=AutoModelForSemanticSegmentation)


class Network(NamedTuple):
    """What a checkpoint becomes.

    Args:
        preset: the variant.
        config: the variant's, with what the tensors tell; or that of a UperNet on it.
        auto_class: which of its models.
        assumed: sentences about what the file does not tell, and what was taken for it.
    """

    preset: str
    config: Any
    auto_class: AutoClass
    assumed: list[str]


class Kind(NamedTuple):
    """A kind of checkpoint.

    Args:
        looks_like: how the sentence ends that begins with "this looks like".
        mark: pattern of the beginning of a tensor's name, which no later kind in `KINDS` has.
        network: makes a network of a checkpoint, given a preset and a `window_padding`, both of which may be `None`.
        instead: if there is no network for it: what is missing, and what could be done.
        never_read: pattern of the names of tensors that no network reads.
        prepare: puts tensors that the authors store in several ways into one.
    """

    looks_like: str
    mark: str
    network: Callable[[Checkpoint, str | None, str | None], Network] | None = None
    instead: str = ""
    never_read: str | None = None
    prepare: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict


# ------------------------------------------------------------------------------------------ what tensors tell


def preset_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Name of the preset that has these normal cells.

    Raises:
        ValueError: none has; the message says what was found.
    """
    # The plain variants have all their cells in the authors' third stage, or in no stage.
    cells = {(match[1] or "2", match[2]) for name in tensors if (match := NORMAL_CELL.match(name))}
    first = tensors.get("layers.2.NC.0.PCM.0.weight", tensors.get("blocks.0.PCM.0.weight"))
    first_convolution = None if first is None else tuple(first.shape[:2])
    has_class_token = "layers.0.RC.cls_token" in tensors or "cls_token" in tensors
    for name in PRESETS:
        config = config_from_preset(name)
        third = 0 if config.is_plain else 2
        hidden_size, groups = config.hidden_sizes[third], config.conv_groups[third]
        convolution = (int(config.mlp_ratio * hidden_size), hidden_size // groups)
        depths = (0, 0, *config.depths) if config.is_plain else config.depths
        expected_cells = {(str(stage), str(cell)) for stage, depth in enumerate(depths) for cell in range(depth)}
        if (cells, first_convolution, has_class_token) == (expected_cells, convolution, config.has_class_token):
            return name
    raise ValueError(
        f"these are not the tensors of a ViTAE variant ({len(cells)} normal cells, widths of the first convolution"
        f" {first_convolution or 'missing'}); known: {', '.join(PRESETS)}"
    )


def image_side(tensors: Mapping[str, torch.Tensor], name: str, stride: int, has_class_entry: bool = True) -> int:
    """Side of the images, in pixels, that a position table is for, whose first entry may be a class token's.

    Raises:
        ValueError: it is missing, not a table, or not for a square.
    """
    if name not in tensors:
        raise ValueError(f"the position table (`{name}`) is missing")
    if tensors[name].ndim != 3:
        raise ValueError(f"the position table (`{name}`) must have three dimensions")
    num_patches = tensors[name].shape[1] - int(has_class_entry)
    side = math.isqrt(max(num_patches, 0))
    if side**2 != num_patches:
        raise ValueError(f"the position table (`{name}`) has {num_patches} patches, not a square number")
    return side * stride


def classifier_fields(tensors: Mapping[str, torch.Tensor], config: ViTAEFamilyConfig) -> dict:
    """The number of labels, and for images of which size a network with a class token is.

    Raises:
        ValueError: the classifier is no matrix, or the position table is none.
    """
    fields = {"num_labels": 2}  # the library's default, as long as nobody knows what a classifier will tell apart
    if has_classifier(tensors):
        if "head.weight" not in tensors or tensors["head.weight"].ndim != 2:
            raise ValueError("there is no classifier (a matrix `head.weight`) in this checkpoint")
        num_labels, width = tensors["head.weight"].shape
        # One of another width does not fit anyway, and may claim millions of rows: it gets no names of classes.
        fields = {"num_labels": num_labels} if width == config.hidden_size else {}
    if config.has_class_token and "layers.0.RC.pos_embed" in tensors:
        fields["image_size"] = image_side(tensors, "layers.0.RC.pos_embed", config.total_stride)
    return fields


def has_classifier(tensors: Iterable[str]) -> bool:
    return any(name.startswith("head.") for name in tensors)


def window_sizes_of(checkpoint: Checkpoint, config: ViTAEv2Config) -> tuple[int | None, ...]:
    """Per stage, the side of the windows, in which reduction cells have a bias of queries, keys and values."""
    sizes, biases = config.window_sizes, [f"layers.{i}.RC.attn.attn.qkv.bias" for i in range(config.num_stages)]
    are_everywhere = any(size is None and bias in checkpoint.tensors for size, bias in zip(sizes, biases))
    told = [window_size_of(name, table) for name, table in checkpoint.never_read.items() if "relative" in name]
    side = told[0] if told else sizes[0]
    return tuple(side if are_everywhere or size else None for size in sizes)


def window_size_of(name: str, table: torch.Tensor) -> int:
    """Side w of the windows that a table of relative positions is for: an index (w², w²), or biases (2w - 1)² long."""
    side = math.isqrt(table.shape[0]) if table.ndim else 0
    return side if name.endswith("_index") else (side + 1) // 2


def window_padding_of(checkpoint: Checkpoint) -> tuple[str, str]:
    """Where windows are padded, as far as tensors tell, and a sentence that says what was assumed."""
    tables = [name for name in checkpoint.never_read if name.endswith("bias_table")]
    are_rsps = all(name.startswith(("layers.0.", "layers.1.")) for name in tables)  # I3CL's are in all stages
    if tables and are_rsps and checkpoint.had_classifier:
        because = "windows are padded at the end, as in RSP's backbones, since a classifier with tables that nothing"
        return "end", f"{because} reads is RSP's; at its 224×224 none are padded; --window_padding both is for others"
    if any(name.startswith("norm0.") for name in checkpoint.never_read):
        because = "windows are padded at the end, since there is a `norm0`, as in the backbones of RSP and SAMRS"
        return "end", f"{because}; if it was trained otherwise, --window_padding both"
    because = "windows are padded on both sides, since there is no `norm0`, which RSP's and SAMRS's backbones have"
    return "both", f"{because}; if it was trained otherwise, --window_padding end"


BY_PADDING = {"both": "vitaev2-s", "end": "vitaev2-s-rsp"}
"""Two presets that differ in where windows are padded, and in nothing else that tensors tell."""


def padding_as_given(checkpoint: Checkpoint, preset: str | None) -> list[str]:
    """Where windows are padded, by the preset that was given if one was, and what was assumed without one.

    Raises:
        ValueError: there are tensors that networks of this preset do not have.
    """
    padding, because = window_padding_of(checkpoint)
    if preset is None:
        return [padding, because]
    as_given = config_from_preset(preset).window_padding
    if padding == "end" != as_given:
        raise ValueError(f"--preset {preset} pads windows on both sides, but {because}")
    return [as_given]


# ---------------------------------------------------------------------------------------------- the networks


def cells(checkpoint: Checkpoint, preset: str | None, window_padding: str | None) -> Network:
    """A classifier, or what is in front of one."""
    given = preset
    preset = given or preset_of(checkpoint.tensors)
    config = config_from_preset(preset)
    assumed: list[str] = []
    fields = classifier_fields(checkpoint.tensors, config)
    if isinstance(config, ViTAEv2Config):
        if window_padding is None:
            window_padding, *assumed = padding_as_given(checkpoint, given)
        if preset in BY_PADDING.values():
            preset = BY_PADDING[window_padding]
        if given not in (None, preset):
            raise ValueError(f"--preset {given} and --window_padding {window_padding} contradict each other")
        fields |= {"window_sizes": window_sizes_of(checkpoint, config), "window_padding": window_padding}
    elif window_padding is not None:
        raise ValueError(f"--window_padding is for ViTAEv2, and this is {preset}, which has no windows")
    return Network(preset, config_from_preset(preset, **fields), model_class(checkpoint), assumed)


def autoencoder(checkpoint: Checkpoint, preset: str | None, window_padding: str | None) -> Network:
    """A masked autoencoder, encoder and decoder."""
    tensors = checkpoint.tensors
    if window_padding is not None:
        raise ValueError("--window_padding is for ViTAEv2, and this is a masked autoencoder, which has no windows")
    preset = preset or preset_of(tensors)
    layers = {match[1] for name in tensors if (match := re.match(r"decoder_blocks\.(\d+)\.", name))}
    fields = {"conv_kernel_size": 1, "decoder_num_hidden_layers": len(layers), "num_labels": 2}
    if "pos_embed" in tensors:
        fields["image_size"] = image_side(tensors, "pos_embed", config_from_preset(preset).total_stride)
    assumed = "the loss compares raw pixels, as for MillionAID; if it did not, set `norm_pix_loss` in config.json"
    return Network(preset, config_from_preset(preset, **fields), model_class(checkpoint), [assumed])


def cells_with_positions(checkpoint: Checkpoint, preset: str | None, window_padding: str | None) -> Network:
    """A plain network without a class token, in whose cells and windows tokens see where others lie.

    Raises:
        ValueError: its positions are not those of a square, or windows that move are not padded on both sides.
    """
    tensors = checkpoint.tensors
    assumed: list[str] = []
    preset = preset or preset_of(tensors)
    stride = config_from_preset(preset).total_stride
    side = image_side(tensors, "pos_embed", stride, has_class_entry=False)
    rows = {match[1]: table for name, table in tensors.items() if (match := ROW_POSITIONS.match(name))}
    lengths = {cell: len(table) for cell, table in rows.items() if table.ndim}
    windows = {length for length in lengths.values() if length != 2 * side // stride - 1}
    fields: dict[str, Any] = {
        "image_size": side,
        "class_token": False,
        "qkv_bias": any(name.endswith("qkv.bias") for name in tensors),
        "use_rel_pos": True,
        "window_type": window_type(tensors),
        "window_size": (min(windows) + 1) // 2 if windows else None,
        "num_labels": len(tensors["head.weight"]) if "head.weight" in tensors else 2,
    }
    if windows:
        fields["global_attn_indexes"] = sorted(int(cell) for cell, length in lengths.items() if length not in windows)
        fields["window_padding"], told = padding_of_windows(fields["window_type"], window_padding)
        assumed += told
    if has_feature_pyramid(tensors):
        fields["rescaled_cells"], told = rescaled_cells(checkpoint)
        assumed += told
        if fields["rescaled_cells"] != (-1,):  # maps of several cells are not normalised
            norm = [name for name in tensors if name.startswith("norm.")]
            checkpoint.never_read.update({name: tensors.pop(name) for name in norm})
    if preset == "vitae-b-rvsa" and fields["window_type"] == "plain":
        preset = "vitae-b"  # all in which the two presets differ is among the fields
    return Network(preset, config_from_preset(preset, **fields), model_class(checkpoint), assumed)


def window_type(tensors: Iterable[str]) -> str:
    """What moves with the content of the windows, as [`ViTAEConfig`] has it."""
    kinds = {"rotated_apart": ".attn.sampling_offsets_k.", "rotated": ".attn.sampling_offsets."}
    return next((kind for kind, part in kinds.items() if any(part in name for name in tensors)), "plain")


def padding_of_windows(kind: str, wanted: str | None) -> tuple[str, list[str]]:
    """Where windows are padded, and what was assumed about it."""
    if kind != "plain":
        if wanted == "end":
            raise ValueError("--window_padding end does not go with rotated windows, which are padded on both sides")
        return "both", []
    if wanted is not None:
        return wanted, []
    return "end", ["windows are padded at the end, as ViTDet's are; --window_padding both is for others"]


def rescaled_cells(checkpoint: Checkpoint) -> tuple[tuple[int, ...], list[str]]:
    """Which cells the four maps of a backbone are taken after, and why, unless it is known."""
    if checkpoint.rescaled_cells is not None:
        return checkpoint.rescaled_cells, []
    groups = [*checkpoint.left_aside, *checkpoint.heads]
    beside = sorted({group for group in groups if re.match(r"decode_head|auxiliary_head", group)})
    because = f"`{beside[0].partition('.')[0]}` is beside the backbone" if beside else ""
    if because or window_type(checkpoint.tensors) != "plain" and not checkpoint.left_aside:
        because = because or "nothing beside the backbone tells what it is for"
        words = "its four maps are those after cells 3, 5, 7 and 11, as for segmentation"
        return (3, 5, 7, 11), [f"{words}: {because}; if it is a detector's, --rescaled_cells -1"]
    words = "its four maps are made from the last one, as for detection"
    return (-1,), [f"{words}; if it is for segmentation, --rescaled_cells 3 5 7 11"]


def has_feature_pyramid(tensors: Iterable[str]) -> bool:
    return any(name.startswith("fpn1.") for name in tensors)


def model_class(checkpoint: Checkpoint) -> AutoClass:
    """The Auto class of what a checkpoint holds."""
    if checkpoint.kind.network is autoencoder:
        return AutoModelForPreTraining
    if has_feature_pyramid(checkpoint.tensors):
        return AutoBackbone
    return AutoModelForImageClassification if has_classifier(checkpoint.tensors) else AutoModel


def as_autoencoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return with_small_kernels(with_whole_biases(tensors))


def without_class_entry(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With positions of patches alone: some tables begin with one for a class token, which no network reads."""
    whole = with_whole_biases(tensors)
    table = whole.get("pos_embed")
    if table is not None and table.ndim == 3 and math.isqrt(table.shape[1] - 1) ** 2 == table.shape[1] - 1:
        whole["pos_embed"] = table[:, 1:]
    return whole


def with_whole_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With `q_bias` and `v_bias` as one bias of queries, keys and values, of which the keys' is zero."""
    whole = dict(tensors)
    for name, query_bias in tensors.items():
        value_bias = tensors.get(f"{name.removesuffix('q_bias')}v_bias")
        if name.endswith(".q_bias") and value_bias is not None and query_bias.ndim == value_bias.ndim == 1:
            stem = name.removesuffix("q_bias")
            del whole[name], whole[f"{stem}v_bias"]
            whole[f"{stem}qkv.bias"] = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
    return whole


def with_small_kernels(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the 1×1 kernels that lie in 3×3 kernels with a border of zeros.

    Raises:
        ValueError: there is something else in a border.
    """
    small, misfits = dict(tensors), []
    for name, weight in tensors.items():
        if re.match(r"blocks\.\d+\.PCM\.\d+\.weight$", name) and weight.shape[2:] == (3, 3):
            small[name] = weight[..., 1:2, 1:2]
            if weight.count_nonzero() > small[name].count_nonzero():
                misfits.append(name)
    if misfits:
        raise ValueError(
            "the kernels of a masked autoencoder are 1×1, or 3×3 with zeros around the middle; these are not, as if"
            f" they had been trained further: {listed(misfits)}"
        )
    return small


# ------------------------------------------------------------------------------------------------- the kinds


KINDS = (
    Kind(
        "a model in the format of this package",
        r"stages\.",
        instead="its tensors have their names already; load its folder with `from_pretrained`",
    ),
    Kind(
        "VSA, a ViTAEv2 whose windows vary in size",
        r"layers\.\d+\.(?:.+\.)?(?:pos|sampling_\w+)\.",
        instead="this package has no such attention; use the authors' code",
    ),
    Kind(
        "the encoder of P3M-Net, which is called ViTAE-S but has no reduction cells",
        r"layers\.0\.RC\.proj1\.",
        instead="this package has no such stem, and the decoder takes its indices too; use the authors' code",
    ),
    Kind(
        "ViTDet's ViTAE-S, with relative positions in windows of 14",
        r"layers\.\d+\.NC\.\d+\.attn\.rel_pos_",
        instead="this package has no such attention; ViTAE-S of ImageNet, from which it was trained, converts",
    ),
    Kind(
        "a ViTAE with relative positions, as RVSA and ViTDet have them",
        r"blocks\.\d+\.attn\.rel_pos_",
        cells_with_positions,
        never_read=r"relative_position_index$",
        prepare=without_class_entry,
    ),
    Kind("a masked autoencoder", r"decoder_blocks\.", autoencoder, prepare=as_autoencoder),
    Kind(
        "the encoder of a masked autoencoder without its decoder, perhaps fine-tuned",
        r"blocks\.",
        instead="it has neither `decoder_blocks.…` nor relative positions; the file of the whole autoencoder converts,"
        " and its folder can be fine-tuned",
    ),
    Kind(
        "ViTAEv2",
        r"layers\.0\.RC\.attn\.attn\.",
        cells,
        never_read=r"relative_position_(?:index|bias_table)$|^norm[0-3](?=\.)",
    ),
    Kind("ViTAE", r"layers\.0\.RC\.", cells),
)
"""All kinds. The first whose mark a tensor has is taken."""


def kind_of(names: Iterable[str]) -> Kind:
    """The kind of checkpoint that has tensors of these names.

    Raises:
        ValueError: this package has no network for it; the message says what could be done.
    """
    names = list(names)
    kind = next(kind for kind in KINDS if any(re.match(kind.mark, name) for name in names))
    if kind.network is None:
        raise ValueError(f"this looks like {kind.looks_like}: {kind.instead}")
    return kind


def find_prefix(names: Iterable[str], wanted: str | None = None) -> str:
    """What is before all names of a network's tensors, with the dot at its end.

    Args:
        wanted: one of several, with or without that dot.

    Raises:
        ValueError: there is no ViTAE among the tensors; or several, and it is not said which is wanted.
    """
    names = list(names)
    found = sorted({match[1] or "" for name in names if (match := FIRST_CELL.match(name))})
    if not found:
        there_are = in_words(counted(name.partition(".")[0] for name in names))
        raise ValueError(
            "these are not the tensors of a ViTAE variant: none is called `layers.0.RC.…` or `blocks.0.PCM.…`, with"
            f" whatever before it; there are {there_are}"
        )
    choice = found if wanted is None else [prefix for prefix in found if prefix.rstrip(".") == wanted.rstrip(".")]
    if len(choice) != 1:
        problem = "several networks are in this checkpoint" if wanted is None else f"there is no prefix {wanted!r}"
        raise ValueError(f"{problem}: --prefix must be one of {listed(map(repr, found))}")
    return choice[0]


def recognise(
    state_dict: Mapping[str, torch.Tensor],
    prefix: str | None = None,
    head: str = "keep",
    rescaled_cells: Sequence[int] | None = None,
) -> Checkpoint:
    """Tell the tensors of a state dict apart.

    Args:
        state_dict: tensors by the authors' names, with whatever before and beside them.
        prefix: as [`find_prefix`] takes it.
        head: `"drop"` leaves a classifier, or the heads of a UperNet, aside.
        rescaled_cells: of a plain backbone, as [`ViTAEConfig`] has them; default: from what is beside it.

    Raises:
        ValueError: as [`find_prefix`] and [`kind_of`] say, or the kind's `prepare`; or `rescaled_cells` are
            given for what is no plain backbone.
    """
    prefix = find_prefix(state_dict, prefix)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    heads = {} if head == "drop" else find_heads(state_dict, prefix)
    beside = [name for name in state_dict if not name.startswith(prefix) and name not in heads]
    left_aside = [group_beside(name, prefix) for name in beside]
    had_classifier = has_classifier(inside)
    if head == "drop":
        left_aside += ["head" for name in inside if name.startswith("head.")]
        inside = {name: tensor for name, tensor in inside.items() if not name.startswith("head.")}
    kind = kind_of(inside)
    if rescaled_cells is not None and not has_feature_pyramid(inside):
        raise ValueError("--rescaled_cells is for backbones of plain variants, and this is none")
    unread = {name for name in inside if kind.never_read and re.search(kind.never_read, name)}
    tensors = kind.prepare({name: tensor for name, tensor in inside.items() if name not in unread})
    never_read = {name: inside[name] for name in inside if name in unread}
    cells = None if rescaled_cells is None else tuple(rescaled_cells)
    own_heads = {own: state_dict[name] for name, own in heads.items()}
    return Checkpoint(kind, tensors, never_read, left_aside, cells, own_heads, had_classifier)


def group_beside(name: str, prefix: str) -> str:
    """What a tensor outside of a prefix belongs to: its name as far as it first differs from the prefix."""
    parts = name.split(".")
    shared = next((index for index, pair in enumerate(zip(parts, prefix.split("."))) if pair[0] != pair[1]), len(parts))
    return ".".join(parts[: shared + 1])


def counted(groups: Iterable[str]) -> dict[str, int]:
    """How often each occurs; of many, the most frequent."""
    counts = Counter(map(printable, groups))
    shown = dict(counts.most_common(MOST_GROUPS))
    others = counts.total() - sum(shown.values())
    return {**shown, "others": others} if others else shown


def in_words(counts: Mapping[str, int]) -> str:
    return listed(f"{group} ({count})" for group, count in counts.items())
