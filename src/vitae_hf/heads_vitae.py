# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The library's heads, whose folders load with a ViTAE or ViTAEv2 backbone where this package is not installed.

`from vitae_hf.heads_vitae import DPTConfig, DPTForDepthEstimation` gives the library's classes under their names. All
that they add: what they save carries the code of the backbones, and loads with `trust_remote_code=True`.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_vitae import ViTAEConfig
from .configuration_vitaev2 import ViTAEv2Config
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
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and mapping.get(library_class.config_class, None) is library_class:
            return name
    return "AutoModel"


@torch.no_grad()
@init.guard_torch_init_functions()
def initialize_weights(self: PreTrainedModel) -> None:
    """Initialise every module, as the library does in its own classes.

    In classes of others it leaves out modules without weights of their own, and with them what a head does to the
    weights of its parts. RT-DETR's boxes then begin wrong, and it hardly learns.
    """

    def apply(module: nn.Module, initialize: Callable[[nn.Module], None]) -> None:
        for child in module.children():
            apply(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialize)
        initialize(module)

    apply(self, self._initialize_weights)


def __getattr__(name: str) -> Any:
    """The class of the library of this name, as a class of this module."""
    library_class = getattr(transformers, name, None)
    if not (isinstance(library_class, type) and issubclass(library_class, (PreTrainedConfig, PreTrainedModel))):
        raise AttributeError(f"{name!r} is no network of transformers and no configuration of one")
    head: Any = type(name, (library_class,), {"__module__": __name__})
    if issubclass(head, PreTrainedModel):
        head.initialize_weights = initialize_weights
    head.register_for_auto_class(auto_class_of(library_class))
    globals()[name] = head
    return head
