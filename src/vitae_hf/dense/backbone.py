# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The backbone of a dense network: its configuration, and the weights of a trained network for it."""

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_BACKBONE_MAPPING, PreTrainedConfig

from ..loading import order_of_classes
from ..messages import listed


def dense_config(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A backbone's configuration whose outputs are all maps that a dense head can use.

    These are the maps of the stages, or, in the plain variants, the four of the feature pyramid, which are 256 channels
    wide, or as wide as the tokens with `rescaled_cells`, unless `changes` say otherwise.

    Args:
        config: of a network or a backbone, such as `config_from_preset("vitae-b")`.
        changes: fields to set, such as `drop_path_rate=0.2`, `frozen_stages=1`, `feature_pyramid_channels=128` or, for
            fewer maps, `out_features`.

    Raises:
        ValueError: it is of no network with a backbone, or `rescaled_cells` are given for one that is not plain.
    """
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        saved = (config.architectures or [type(config).__name__])[0]
        kinds = "a classifier, a network without a head or a backbone"
        raise ValueError(f"a backbone begins with {kinds}, not with {saved}")
    fields = config.to_dict()
    for derived in ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "architectures"):
        fields.pop(derived, None)
    is_plain = getattr(config, "is_plain", False)
    if "rescaled_cells" in changes and not is_plain:
        raise ValueError("rescaled_cells is for the plain variants, such as vitae-b-rvsa; this network has stages")
    if is_plain:  # with a pyramid, its maps are the default
        fields["reshape_hidden_states"] = True
        if "rescaled_cells" in changes:
            fields["feature_pyramid_channels"] = None
        elif not config.rescaled_cells:
            fields["feature_pyramid_channels"] = config.feature_pyramid_channels or 256
    else:
        fields["out_features"] = config.stage_names[1:]
    return type(config)(**{**fields, **changes})


def trained_whole(
    folder: str | Path,
    config_class: Any,
    model_class: Any,
    names: dict[int, str],
    changes: dict[str, Any],
    class_weights: tuple[str, ...],
) -> Any:
    """A trained dense network with all its weights, but for those of another number of classes.

    Args:
        folder: or Hub name.
        names: of the classes, by number.
        changes: of its backbone, as in [`dense_config`].
        class_weights: what the names of weights have in them that depend on the number of classes.

    Raises:
        ValueError: the folder lacks other weights, or has them of other sizes, and the message names them; or its
            classes are these in another order.
    """
    config = config_class.from_pretrained(folder)
    fields = {**config.backbone_config.to_dict(), **changes}
    fields.pop("out_indices", None)  # they repeat `out_features`, which `changes` may set
    config.backbone_config = type(config.backbone_config)(**fields)
    if order_of_classes(config.id2label, names) is not None:
        raise ValueError(
            f"{folder} has the classes of the data in another order, {listed(config.id2label.values())}: bring those of"
            " the data into it, or begin with a backbone"
        )
    config.id2label, config.label2id = names, {label: number for number, label in names.items()}
    model, loading = model_class.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    keys = {*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}
    if lost := sorted(key for key in keys if not any(part in key for part in class_weights)):
        raise ValueError(f"{folder} lacks {len(lost)} weights of this network, or has them of other sizes: {lost[:5]}")
    return model.train()


def trained_backbone(folder: str | Path, config: PreTrainedConfig) -> Any:
    """A backbone of this configuration with the weights of a classifier, a network without a head or a backbone.

    Args:
        folder: or Hub name.
        config: see [`dense_config`].

    Raises:
        ValueError: the folder lacks weights of the backbone; the message names them.
    """
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    backbone, loading = backbone_class.from_pretrained(folder, config=config, output_loading_info=True)
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("feature_pyramid.")):
        raise ValueError(f"{folder} lacks {len(missing)} weights of {backbone_class.__name__}: {missing[:5]}")
    return backbone
