# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The library's heads, whose folders load with a ViTAE or ViTAEv2 backbone where this package is not installed.

`from vitae_hf.heads_vitae import DPTConfig, DPTForDepthEstimation` gives the library's classes under their names. All
that they add: what they save carries the code of the backbones, and loads with `trust_remote_code=True`.
"""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .configuration_vitae import ViTAEConfig
from .configuration_vitaev2 import ViTAEv2Config
from .modeling_base_vitae import initialize_every_module
from .modeling_vitae import ViTAEBackbone
from .modeling_vitaev2 import ViTAEv2Backbone


for config_class, backbone_class in ((ViTAEConfig, ViTAEBackbone), (ViTAEv2Config, ViTAEv2Backbone)):
    if config_class.model_type not in CONFIG_MAPPING:  # the package, if it is installed, has registered its own
        AutoConfig.register(config_class.model_type, config_class)
        AutoBackbone.register(config_class, backbone_class)


def auto_class_of(library_class: Any) -> str:
    """The name of the Auto class that loads a class of the library, such as `AutoModelForDepthEstimation`."""
    if issubclass(library_class, PreTrainedConfig):
        return "AutoConfig"
    for name, auto_class in sorted(vars(modeling_auto).items()):
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and mapping.get(library_class.config_class, None) is library_class:
            return name
    return "AutoModel"


def __getattr__(name: str) -> Any:
    """The class of the library of this name, as a class of this module."""
    library_class = getattr(transformers, name, None)
    if not (isinstance(library_class, type) and issubclass(library_class, (PreTrainedConfig, PreTrainedModel))):
        raise AttributeError(f"{name!r} is no network of transformers and no configuration of one")
    head: Any = type(name, (library_class,), {"__module__": __name__})
    if issubclass(head, PreTrainedModel):
        head.initialize_weights = initialize_every_module
    head.register_for_auto_class(auto_class_of(library_class))
    globals()[name] = head
    return head
