# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE for Hugging Face Transformers. Importing this package makes the Auto classes know the `vitae` model type."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_vitae import ViTAEConfig
from .conversion import convert_original_state_dict, detect_preset, load_original_checkpoint
from .image_processing_vitae import ViTAEImageProcessor, ViTAEImageProcessorPil
from .modeling_vitae import (
    ViTAEBackbone,
    ViTAEForImageClassification,
    ViTAEForPreTraining,
    ViTAEModel,
    ViTAEPreTrainedModel,
)
from .presets import PRESETS, config_from_preset


__version__ = "0.1.0"

AutoConfig.register("vitae", ViTAEConfig, exist_ok=True)
AutoModel.register(ViTAEConfig, ViTAEModel, exist_ok=True)
AutoModelForImageClassification.register(ViTAEConfig, ViTAEForImageClassification, exist_ok=True)
AutoModelForPreTraining.register(ViTAEConfig, ViTAEForPreTraining, exist_ok=True)
AutoBackbone.register(ViTAEConfig, ViTAEBackbone, exist_ok=True)
AutoImageProcessor.register(
    ViTAEConfig,
    image_processor_classes={"torchvision": ViTAEImageProcessor, "pil": ViTAEImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "PRESETS",
    "ViTAEBackbone",
    "ViTAEConfig",
    "ViTAEForImageClassification",
    "ViTAEForPreTraining",
    "ViTAEImageProcessor",
    "ViTAEImageProcessorPil",
    "ViTAEModel",
    "ViTAEPreTrainedModel",
    "config_from_preset",
    "convert_original_state_dict",
    "detect_preset",
    "load_original_checkpoint",
]
