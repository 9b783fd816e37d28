# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint of the authors to a model folder: tensors renamed, the folder written whole, and tried."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel

from ..class_names import distinct, imagenet_names
from ..configuration_vitae import ViTAEConfig
from ..failures import about
from ..files import whole_folder
from ..image_processing_vitae import ViTAEImageProcessorPil, read_image, to_rgb
from ..loading import OUR_PROCESSORS, best_labels, load_trained, segmentation_processor
from ..messages import listed, printable
from ..modeling_vitae import ViTAEForPreTraining
from .cards import converted_card, variant_card
from .checksums import sha256, write_sums
from .kinds import Checkpoint, Network, counted, model_class, preset_of, recognise
from .original_files import find_checkpoint, read_tensors, state_dict_of, weights_in
from .original_names import new_model, original_layout
from .upernet import class_names, picture_side
from .variants import VARIANTS


def detect_preset(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Name of the preset that an original state dict belongs to, from its normal cells.

    Raises:
        ValueError: it is none of the variants, or of a kind that this package lacks; the message says what was found.
    """
    return preset_of(recognise(state_dict).tensors)


def config_from_original(state_dict: Mapping[str, torch.Tensor], preset: str | None = None) -> Any:
    """The configuration of an original state dict: its preset, with what its tensors tell, such as the label count.

    If the heads of a UperNet are beside it, that of the UperNet, whose `backbone_config` it is.

    Raises:
        ValueError: unknown preset or variant, or a classifier or position table that cannot be.
    """
    checkpoint = recognise(state_dict)
    return checkpoint.network(preset).config


def convert_original_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: PreTrainedConfig | None = None
) -> dict[str, torch.Tensor]:
    """Rename the tensors of an original state dict and split fused projections.

    Nothing is resized, and nothing of the network is left out but what no network reads.

    Args:
        state_dict: tensors by the authors' names, with whatever before them, as `module.`, and beside them.
        config: of the network; default: recognised by [`config_from_original`].

    Returns:
        The state dict of a classifier with that configuration; of a base model, if there is no classifier; of a masked
        autoencoder; or of a UperNet, if its heads are beside the backbone and `config` is no backbone's.

    Raises:
        ValueError: a tensor is missing, left over, of another shape or not finite; the message names the first ten.
    """
    checkpoint = recognise(state_dict)
    if config is None:
        return rename(checkpoint, checkpoint.network())
    if config.model_type == "upernet":
        return rename(checkpoint, Network("", config, AutoModelForSemanticSegmentation, []))
    return rename(checkpoint._replace(heads={}), Network("", config, model_class(checkpoint), []))


def rename(checkpoint: Checkpoint, network: Network) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by our names; see [`convert_original_state_dict`]."""
    tensors = checkpoint.tensors | checkpoint.heads
    layout = original_layout(network.config, network.auto_class)
    problems = [f"missing: {name}" for name in layout if name not in tensors]
    problems += [f"not expected: {printable(name)}" for name in tensors if name not in layout]
    converted = {}
    for original, parts in layout.items():
        if original not in tensors:
            continue
        shape = next(iter(parts.values()))
        expected = (len(parts) * shape[0], *shape[1:]) if shape else ()
        if tuple(tensors[original].shape) != tuple(expected):
            problems.append(f"wrong shape: {original} is {tuple(tensors[original].shape)}, expected {tuple(expected)}")
            continue
        if not (tensors[original].is_meta or tensors[original].isfinite().all()):
            problems.append(f"not finite: {original}")
        pieces = tensors[original].chunk(len(parts)) if len(parts) > 1 else [tensors[original]]
        converted.update({name: piece.clone() for name, piece in zip(parts, pieces)})
    if problems:
        is_head = any("_head." in problem for problem in problems)
        instead = "\n--head drop leaves the heads of the UperNet aside" if is_head and checkpoint.heads else ""
        raise ValueError(f"{len(problems)} tensors do not fit this network:\n  " + listed(problems, "\n  ") + instead)
    return converted


def read_labels(path: str | Path | None, num_labels: int) -> list[str] | None:
    """Class names in order: from a JSON list, or ImageNet-1k's for 1,000 classes; other heads have none.

    Raises:
        ValueError: the file is no JSON list of `num_labels` names.
        ImportError: ImageNet's names are needed and timm, which has them, is not installed.
    """
    if path is not None:
        try:
            names = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:  # no JSON, or no text
            raise ValueError(f"{path} must be a JSON list of class names: {error}") from error
        if not isinstance(names, list) or len(names) != num_labels or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{path} must be a JSON list of {num_labels} class names, one for each output of the classifier"
            )
        return names
    if num_labels != 1000:
        return None
    try:
        return list(imagenet_names().values())
    except ImportError as error:
        raise ImportError(f"{error}, or pass --labels") from error


RESIZED_TO_256 = ("vitae-b-rvsa", "vitaev2-s-rsp")
"""The presets whose authors evaluate 224 of 256 pixels; those of the others, 224 of 248."""


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    preset: str | None = None,
    labels: str | Path | None = None,
    verify: str | Path | None = None,
    *,
    prefix: str | None = None,
    head: str = "keep",
    window_padding: str | None = None,
    rescaled_cells: Sequence[int] | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Write an original checkpoint as a folder for `from_pretrained` and the Hub, whole or not at all.

    A classifier of the authors' variants gets their model card, if every tensor of the file is in it; any other folder
    one that says what it was made of.

    Args:
        source: file, or where it is on the Hub, as [`original_files.find_checkpoint`] takes it.
        output: folder to create.
        preset: which network it is; default: recognised from the tensors.
        labels: JSON list of class names; default: those that a run saved beside a UperNet, ImageNet-1k's for 1,000
            classes of a classifier, else generic ones.
        verify: image to run through the reloaded folder.
        prefix: of the network's tensors, if the file has several networks.
        head: `"drop"`: without the classifier, or the heads of a UperNet.
        window_padding: of a ViTAEv2, as its configuration has it; default: from the tensors, as far as they tell.
        rescaled_cells: of a plain backbone, as [`recognise`] takes it.
        weights: the key that they are under, if the file has several sets; default: averaged ones, if there are some.

    Returns:
        The folder, and what was found: name and SHA-256 of the file, and under which key the weights are, if under
        one; preset, class and parameters of the model; number
        of labels, whether they have names, whether these are ImageNet-1k's; image size; `left_aside` and `never_read`,
        the number of tensors by what they belong to; `assumed`, sentences; and what [`verify_folder`] gives.

    Raises:
        ValueError: as [`load_original_checkpoint`], [`recognise`], [`rename`] and [`verify_folder`] say.
        OSError: `output` exists and is not empty, or a file cannot be read, downloaded or written.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already and is not an empty folder")
    if verify is not None:
        read_image(verify)  # fail now, not after the conversion
    with about(str(source)):
        path = find_checkpoint(source)
        content = read_tensors(path)
        checkpoint = recognise(state_dict_of(content, path, weights), prefix, head, rescaled_cells)
        network = checkpoint.network(preset, window_padding)
        taken, *others = [weights] if weights else weights_in(content) or [""]
        if others:
            network.assumed.append(
                f"the weights are those of `{taken}`; --weights {others[0]} takes others of the file"
            )
        names = class_names(content) if checkpoint.heads and labels is None else None
        model = build(checkpoint, network, labels, names)
    found = {"output": str(output), "file": path.name, "sha256": sha256(path), "weights": taken or None}
    record = {**found, **describe(model, checkpoint, network)}
    record["is_imagenet_1k"] = labels is None and not checkpoint.heads and record["num_labels"] == 1000
    with whole_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        processor_of(record).save_pretrained(unfinished)
        card_of(record, output.name, network.config).save(unfinished / "README.md")
        write_sums(unfinished, sorted(unfinished.iterdir()))
        if verify is not None:
            record["verified"] = verify_folder(unfinished, verify)
    return record


def processor_of(record: dict[str, Any]) -> Any:
    """The image processor of a converted model, as the evaluation of its authors has it."""
    if record["class"] == "UperNetForSemanticSegmentation":
        return segmentation_processor(record["image_size"])
    options: dict[str, Any] = {"crop_pct": 0.875} if record["preset"] in RESIZED_TO_256 else {}
    return ViTAEImageProcessorPil(size=record["image_size"], **options)


def has_classes(checkpoint: Checkpoint) -> bool:
    return "head.weight" in checkpoint.tensors or bool(checkpoint.heads)


def build(
    checkpoint: Checkpoint, network: Network, labels: str | Path | None, names: list[str] | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, with its weights and the names of its classes.

    Args:
        labels: as in [`convert_checkpoint`].
        names: of the classes, that the file tells; another number than the network has is not taken.
    """
    config = network.config
    if labels is not None and not has_classes(checkpoint):
        raise ValueError("--labels are names of classes, and this checkpoint has no classifier, or it was dropped")
    if labels is not None or "head.weight" in checkpoint.tensors:
        names = read_labels(labels, config.num_labels)
    elif names and len(names) != config.num_labels:
        told = f"the file names {len(names)} classes, and the network has {config.num_labels}"
        network.assumed.append(f"{told}, so that none of these is taken: {listed(names)}; --labels FILE gives them")
        names = None
    if names:
        config.id2label = dict(enumerate(distinct(names)))
        config.label2id = {name: index for index, name in config.id2label.items()}
    # Before the model is built: what does not fit may describe one of any size.
    weights = rename(checkpoint, network)
    model = new_model(config, network.auto_class)
    model.load_state_dict(weights)
    return model


def describe(model: PreTrainedModel, checkpoint: Checkpoint, network: Network) -> dict[str, Any]:
    """What was found in a checkpoint, for its record."""
    never_read = [name.removesuffix(".weight").removesuffix(".bias") for name in checkpoint.never_read]
    return {
        "preset": network.preset,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_labels": model.config.num_labels if has_classes(checkpoint) else None,
        "has_class_names": any(label != f"LABEL_{index}" for index, label in (model.config.id2label or {}).items()),
        "image_size": picture_side(model.config) if checkpoint.heads else model.config.image_size,
        "left_aside": counted(checkpoint.left_aside),
        "never_read": counted(name.rpartition(".")[-1] for name in never_read),
        "assumed": network.assumed,
    }


def card_of(record: dict[str, Any], name: str, config: PreTrainedConfig) -> ModelCard:
    """The card of a folder: its variant's, if that is true of it, since it says that the file's tensors are all there.

    Args:
        name: of the model.
    """
    is_whole = not record["left_aside"] and set(record["never_read"]) <= {"relative_position_index"}
    is_of_vitdet = isinstance(config, ViTAEConfig) and config.use_rel_pos and config.window_type == "plain"
    is_classifier = record["class"].endswith("ForImageClassification")
    if record["preset"] in VARIANTS and is_classifier and is_whole and not is_of_vitdet:
        return variant_card(record["preset"], name, record)
    return converted_card(name, record)


@torch.no_grad()
def verify_folder(folder: str | Path, image: str | Path) -> list[dict[str, Any]] | dict[str, Any]:
    """Reload a written folder as its users do and run one image through it.

    Returns:
        Of a classifier the five likeliest, as `pipeline` gives them: `{"label": …, "score": …}`; of a UperNet the five
        that most pixels have, and their share as the score. Of a base model the shapes of its outputs, of a backbone
        those of its maps, of a masked autoencoder its `loss` on that image.

    Raises:
        ValueError: an output is not finite, weights are missing, or the image cannot be read.
    """
    model, processor = load_trained(folder, dtype="auto", headless=True, dense=True)
    picture = image if isinstance(processor, OUR_PROCESSORS) else to_rgb(read_image(image))
    pixel_values = processor(picture, return_tensors="pt").pixel_values
    if isinstance(model, ViTAEForPreTraining):
        return {"loss": round(reconstruction_loss(model, pixel_values), 4)}
    outputs = model(pixel_values)
    if "feature_maps" in outputs:
        outputs = dict(zip(model.config.out_features, outputs.feature_maps))
    if not all(output.isfinite().all() for output in outputs.values()):
        raise ValueError(f"the converted network gives outputs that are not finite for {image}")
    if "logits" not in outputs:
        return {name: list(output.shape) for name, output in outputs.items()}
    scores = outputs.logits[0]
    if scores.ndim == 3:  # of each pixel; its class gets a point, and the logarithm makes shares of all points
        scores = nn.functional.one_hot(scores.argmax(0), len(scores)).double().mean((0, 1)).log()
    return [{**entry, "score": round(entry["score"], 4)} for entry in best_labels(model.config, scores)]


def reconstruction_loss(model: ViTAEForPreTraining, pixel_values: torch.Tensor) -> float:
    """How far a masked autoencoder is from the pixels of an image that it does not see, always the same ones."""
    num_patches = pixel_values[0, 0].numel() // model.config.total_stride**2
    noise = torch.rand((1, num_patches), generator=torch.Generator().manual_seed(0))
    loss = model(pixel_values, noise=noise).loss.item()
    if not loss < float("inf"):
        raise ValueError(f"the converted masked autoencoder gives a loss of {loss}")
    return loss
