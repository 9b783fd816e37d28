# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""UperNet on a ViTAE backbone: built, and begun from a trained model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...heads_vitae import UperNetConfig, UperNetForSemanticSegmentation
from ..backbone import dense_config, trained_backbone, trained_whole
from .data import IGNORED_CLASS


def new_segmenter(
    config: PreTrainedConfig, names: dict[int, str], head_channels: int = 512
) -> UperNetForSemanticSegmentation:
    """A UperNet with random weights.

    With three maps or more it has an auxiliary head on the third map (stride 16), half as wide as the main head.

    Args:
        config: of the backbone; see [`dense_config`].
        names: of the classes, by number.
        head_channels: width of the head.
    """
    config = UperNetConfig(
        backbone_config=config,
        hidden_size=head_channels,
        use_auxiliary_head=len(config.out_features) > 2,  # the library puts it on the third map
        auxiliary_channels=max(head_channels // 2, 1),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        loss_ignore_index=IGNORED_CLASS,
    )
    return UperNetForSemanticSegmentation(config).train()  # `train` freezes the stages of `frozen_stages`


def load_segmenter(
    folder: str | Path, names: dict[int, str], head_channels: int = 512, **changes: Any
) -> UperNetForSemanticSegmentation:
    """A UperNet for these classes that begins with trained weights.

    Args:
        folder: or Hub name. A classifier, a network without a head or a backbone gets new heads; a UperNet keeps its
            weights, but for classifiers of another number of classes.
        names, head_channels: as in [`new_segmenter`]; a UperNet keeps its width.
        changes: as in [`dense_config`].

    Raises:
        ValueError: the folder lacks weights of the backbone or UperNet; the message names them.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == UperNetConfig.model_type:
        return trained_whole(folder, UperNetConfig, UperNetForSemanticSegmentation, names, changes, (".classifier.",))
    config = dense_config(config, **changes)
    backbone = trained_backbone(folder, config)
    model = new_segmenter(backbone.config, names, head_channels)
    model.backbone.load_state_dict(backbone.state_dict())
    return model
