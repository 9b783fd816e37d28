# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Detectors on ViTAE backbones: built, begun from a trained model, and what each of them takes."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    DeformableDetrImageProcessor,
    Mask2FormerImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...configuration_rcnn_vitae import RCNNConfig
from ...heads_vitae import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
)
from ...image_processing_rcnn_vitae import RCNNImageProcessor
from ...modeling_rcnn_vitae import RCNNForObjectDetection
from ..backbone import dense_config, trained_backbone, trained_whole


SIZE_DIVISOR = 32
"""Of RT-DETR, which adds maps to others of twice their size."""


class HeadSize(NamedTuple):
    """How large a new head is.

    Attributes:
        channels: width of its maps and queries.
        layers: of its decoder; the R-CNNs have none.
        queries: objects that it can find at most; by default what the kind of detector has.
    """

    channels: int = 256
    layers: int = 6
    queries: int | None = None

    def attention_heads(self) -> int:
        return max(self.channels // 32, 1)


def rt_detr_config(channels: list[int], head: HeadSize) -> dict[str, Any]:
    width, queries = head.channels, head.queries or 300
    return {
        "encoder_in_channels": channels,
        "freeze_backbone_batch_norms": False,  # `frozen_batch_norm` of the training freezes those of any network
        "d_model": width,
        "encoder_hidden_dim": width,
        "decoder_in_channels": [width] * len(channels),
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "encoder_attention_heads": head.attention_heads(),
        "decoder_attention_heads": head.attention_heads(),
        "decoder_layers": head.layers,
        "num_queries": queries,
        "num_denoising": max(queries // 3, 1),  # 100 beside 300 in the paper
    }


def deformable_detr_config(channels: list[int], head: HeadSize) -> dict[str, Any]:
    width = head.channels
    return {
        "d_model": width,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "encoder_attention_heads": head.attention_heads(),
        "decoder_attention_heads": head.attention_heads(),
        "encoder_layers": head.layers,
        "decoder_layers": head.layers,
        "num_queries": head.queries or 300,
        "num_feature_levels": len(channels) + 1,
        "auxiliary_loss": True,
        "with_box_refine": True,
    }


def mask2former_config(channels: list[int], head: HeadSize) -> dict[str, Any]:
    width = head.channels
    return {
        "feature_size": width,
        "mask_feature_size": width,
        "hidden_dim": width,
        "encoder_feedforward_dim": 4 * width,
        "dim_feedforward": 8 * width,
        "num_attention_heads": head.attention_heads(),
        "encoder_layers": head.layers,
        "decoder_layers": head.layers + 4,  # 10 beside 6 in the paper
        "num_queries": head.queries or 100,
        "feature_strides": [4 * 2**level for level in range(len(channels))],
    }


def faster_rcnn_config(channels: list[int], head: HeadSize) -> dict[str, Any]:
    return {"hidden_size": head.channels, "head_hidden_size": 4 * head.channels, "with_masks": False}


def mask_rcnn_config(channels: list[int], head: HeadSize) -> dict[str, Any]:
    return {**faster_rcnn_config(channels, head), "with_masks": True}


class Detector(NamedTuple):
    """One kind of detector.

    Attributes:
        config_class, model_class, processor_class: of this package, which saves the code of the backbones with them, or
            of the library.
        settings: what the configuration has for a width of each map and a size of the head.
        backbone: where the backbone is in the model.
        class_weights: parts of the names of weights whose size follows the number of classes.
        with_masks: whether it learns masks.
        maps: how many maps it takes, the last ones; by default all.
        width_divisor: of which its head's width must be a multiple.
        least_layers: of its decoder.
    """

    config_class: Any
    model_class: Any
    processor_class: Any
    settings: Callable[[list[int], HeadSize], dict[str, Any]]
    backbone: str
    class_weights: tuple[str, ...]
    with_masks: bool = False
    maps: int | None = None
    width_divisor: int = 32
    least_layers: int = 1


_RCNN: tuple[Any, Any, Any] = (RCNNConfig, RCNNForObjectDetection, RCNNImageProcessor)
_RCNN_CLASSES = ("box_predictor.", "mask_fcn_logits.")
DETECTORS: dict[str, Detector] = {
    "rt_detr": Detector(
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        rt_detr_config,
        "model.backbone.model",
        ("class_embed.", "enc_score_head."),
        maps=3,
        width_divisor=4,
    ),
    "deformable_detr": Detector(
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
        deformable_detr_config,
        "model.backbone.model",
        ("class_embed.",),
        maps=3,
        least_layers=2,  # the library ties the boxes of each layer to those of the first
    ),
    "mask2former": Detector(
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        mask2former_config,
        "model.pixel_level_module.encoder",
        ("class_predictor.", "criterion.empty_weight"),
        with_masks=True,
    ),
    "faster_rcnn": Detector(*_RCNN, faster_rcnn_config, "backbone", _RCNN_CLASSES, width_divisor=1),
    "mask_rcnn": Detector(*_RCNN, mask_rcnn_config, "backbone", _RCNN_CLASSES, with_masks=True, width_divisor=1),
}
"""The detectors by the names that `vitae detect` knows them by."""


def kind_of(config: PreTrainedConfig) -> str | None:
    """The name of the detector that a configuration is of, if it is one of `DETECTORS`."""
    for name, detector in DETECTORS.items():
        if config.model_type == detector.config_class.model_type:
            if detector.with_masks == getattr(config, "with_masks", detector.with_masks):
                return name
    return None


def has_masks(config: PreTrainedConfig) -> bool:
    """Whether a detector of this configuration finds masks too."""
    kind = kind_of(config)
    return kind is not None and DETECTORS[kind].with_masks


def detector_backbone(config: PreTrainedConfig, name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a backbone with the maps that a detector takes; see [`dense_config`]."""
    whole = dense_config(config, **changes)
    maps = DETECTORS[name].maps
    if maps is None or "out_features" in changes or len(whole.out_features) <= maps:
        return whole
    return dense_config(config, **changes, out_features=whole.out_features[-maps:])


def new_detector(
    name: str, backbone_config: PreTrainedConfig, names: dict[int, str], head: HeadSize | None = None
) -> PreTrainedModel:
    """A detector with random weights.

    Args:
        name: one of `DETECTORS`.
        backbone_config: see [`detector_backbone`].
        names: of the classes, by number.
        head: its size; default: that of the papers.

    Raises:
        ValueError: the head has a width or a depth that this detector cannot have.
    """
    detector, head = DETECTORS[name], head or HeadSize()
    if head.channels % detector.width_divisor:
        raise ValueError(f"the head of {name} must be a multiple of {detector.width_divisor} wide, got {head.channels}")
    if head.layers < detector.least_layers:
        raise ValueError(f"the decoder of {name} must have at least {detector.least_layers} layers, got {head.layers}")
    with torch.device("meta"):
        channels = list(AutoBackbone.from_config(backbone_config).channels)
    config = detector.config_class(
        backbone_config=backbone_config,
        id2label=names,
        label2id={label: number for number, label in names.items()},
        **detector.settings(channels, head),
    )
    return detector.model_class(config).train()  # `train` freezes the stages of `frozen_stages`


def load_detector(
    folder: str | Path, name: str, names: dict[int, str], head: HeadSize | None = None, **changes: Any
) -> PreTrainedModel:
    """A detector for these classes that begins with trained weights.

    Args:
        folder: or Hub name. A classifier, a network without a head or a backbone gets a new head; a detector keeps its
            weights, but for those of another number of classes.
        name, names, head: as in [`new_detector`]; a trained detector keeps its size.
        changes: as in [`dense_config`].

    Raises:
        ValueError: the folder holds a detector of another kind, or lacks weights; the message names them.
    """
    config = AutoConfig.from_pretrained(folder)
    if (found := kind_of(config)) is not None:
        if found != name:
            raise ValueError(f"{folder} holds a {found}: give --detector {found}, or another model to begin with")
        detector = DETECTORS[name]
        kept = detector.config_class, detector.model_class
        return trained_whole(folder, *kept, names, changes, detector.class_weights)
    backbone = trained_backbone(folder, detector_backbone(config, name, **changes))
    model = new_detector(name, backbone.config, names, head)
    own = attrgetter(DETECTORS[name].backbone)(model)
    loading = own.load_state_dict(backbone.state_dict(), strict=False)
    # Where the library freezes BatchNorm for good, there is no count of batches.
    if lost := [key for key in (*loading[0], *loading[1]) if not key.endswith(".num_batches_tracked")]:
        raise ValueError(f"the backbone of {name} does not take {len(lost)} weights of {folder}: {lost[:5]}")
    return model


def make_processor(name: str, size: dict[str, int]) -> Any:
    """The image processor of a detector, with ImageNet's mean and standard deviation.

    Args:
        name: one of `DETECTORS`.
        size: `height` and `width`, or `shortest_edge` and `longest_edge`.

    Raises:
        ValueError: RT-DETR cannot take pictures of this size.
    """
    if name == "rt_detr" and any(side % SIZE_DIVISOR for side in size.values()):
        raise ValueError(f"image_size of rt_detr must be multiples of {SIZE_DIVISOR}, got {[*size.values()]}")
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return DETECTORS[name].processor_class(size=size, do_normalize=True, image_mean=mean, image_std=std)


def training_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a detector is trained on, of a batch of [`collate_objects`]: boxes as shares of each picture.

    Returns:
        `pixel_values`, `pixel_mask`, and `labels`, of each picture `class_labels` `(N,)`, `boxes` `(N, 4)` as centre,
        width and height, and its `masks`, if there are any, filled up to the size of the batch.
    """
    pixel_mask, labels = batch["pixel_mask"], []
    for own, label in zip(pixel_mask, batch["labels"]):
        rows, columns = own[:, 0].sum(), own[0].sum()
        left_top, right_bottom = label["boxes"].chunk(2, dim=-1)
        boxes = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=-1)
        labels.append({**label, "boxes": boxes / torch.stack([columns, rows, columns, rows])})
        if "masks" in label:
            filled = boxes.new_zeros(len(boxes), *own.shape)
            filled[:, : label["masks"].shape[-2], : label["masks"].shape[-1]] = label["masks"]
            labels[-1]["masks"] = filled
    return {"pixel_values": batch["pixel_values"], "pixel_mask": pixel_mask, "labels": labels}


def mask2former_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same as Mask2Former takes it: lists of masks and classes, without boxes."""
    labels = inputs["labels"]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    masks, classes = ([label[key] for label in labels] for key in ("masks", "class_labels"))
    return {**rest, "mask_labels": masks, "class_labels": classes}
