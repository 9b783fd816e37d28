# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of Faster and Mask R-CNN on a backbone of the library or of this package."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_vitae import ViTAEConfig, complete_labels, refuse_misspelt
from .configuration_vitaev2 import ViTAEv2Config


OWN_BACKBONES: dict[str, type[PreTrainedConfig]] = {"vitae": ViTAEConfig, "vitaev2": ViTAEv2Config}


@strict
class RCNNConfig(PreTrainedConfig):
    r"""
    Settings of [`RCNNForObjectDetection`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Of a backbone whose first map has stride 4, each further map twice that of the one before; by default
            ViTAEv2-S with all its maps.
        hidden_size (`int`, *optional*, defaults to 256): Width of the feature pyramid.
        head_hidden_size (`int`, *optional*, defaults to 1024): Width of the head that classifies boxes.
        with_masks (`bool`, *optional*, defaults to `True`): Mask R-CNN; without masks it is Faster R-CNN.
        anchor_size (`int`, *optional*, defaults to 32):
            Side in pixels of the anchors on the first map; it doubles from map to map. The last map, made by pooling,
            has anchors too.
        anchor_ratios (`tuple[float, ...]`, *optional*, defaults to `(0.5, 1.0, 2.0)`): Height over width of anchors.
        score_threshold (`float`, *optional*, defaults to 0.05): Boxes with lower scores are dropped.
        nms_threshold (`float`, *optional*, defaults to 0.5):
            Of boxes of a class that overlap by more than this, the one with the highest score stays.
        max_detections (`int`, *optional*, defaults to 100): How many boxes of a picture are kept.

    Raises:
        StrictDataclassError: a value is out of bounds.
        ValueError: a keyword is almost the name of a field.
    """

    model_type = "vitae_rcnn"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 256
    head_hidden_size: int = 1024
    with_masks: bool = True
    anchor_size: int = 32
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    max_detections: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            every_map: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
            self.backbone_config = ViTAEv2Config(**every_map)
        elif isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            config_class = OWN_BACKBONES.get(fields["model_type"]) or CONFIG_MAPPING[fields["model_type"]]
            self.backbone_config = config_class.from_dict(fields)
        for name in () if "model_type" in kwargs else kwargs:  # typed, not saved
            refuse_misspelt(type(self), name)
        complete_labels(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """See that every number is one that a network can have."""
        for name in ("hidden_size", "head_hidden_size", "anchor_size", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1, got {getattr(self, name)}.")


RCNNConfig.register_for_auto_class()

__all__ = ["RCNNConfig"]
