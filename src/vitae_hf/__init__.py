# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""ViTAE for Hugging Face Transformers. Importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
)

from . import forks as forks
from .configuration_rcnn_vitae import RCNNConfig
from .configuration_vitae import ViTAEConfig
from .configuration_vitaev2 import ViTAEv2Config
from .deployment.inference import prepare_for_inference
from .files import find_model
from .hub.conversion import convert_original_state_dict, detect_preset
from .hub.original_files import load_original_checkpoint
from .image_processing_rcnn_vitae import RCNNImageProcessor
from .image_processing_vitae import ViTAEImageProcessor, ViTAEImageProcessorPil
from .modeling_rcnn_vitae import RCNNForObjectDetection
from .modeling_vitae import (
    ViTAEBackbone,
    ViTAEForImageClassification,
    ViTAEForMaskedImageModeling,
    ViTAEForPreTraining,
    ViTAEModel,
    ViTAEPreTrainedModel,
)
from .modeling_vitaev2 import (
    ViTAEv2Backbone,
    ViTAEv2ForImageClassification,
    ViTAEv2ForMaskedImageModeling,
    ViTAEv2Model,
    ViTAEv2PreTrainedModel,
)
from .prediction.rows import predict
from .presets import PRESETS, config_from_preset


__version__ = "0.2.0.dev0"

for config_class, model_class, classifier_class, masked_class, backbone_class in (
    (ViTAEConfig, ViTAEModel, ViTAEForImageClassification, ViTAEForMaskedImageModeling, ViTAEBackbone),
    (ViTAEv2Config, ViTAEv2Model, ViTAEv2ForImageClassification, ViTAEv2ForMaskedImageModeling, ViTAEv2Backbone),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, classifier_class, exist_ok=True)
    AutoModelForMaskedImageModeling.register(config_class, masked_class, exist_ok=True)
    AutoBackbone.register(config_class, backbone_class, exist_ok=True)
    AutoImageProcessor.register(
        config_class,
        image_processor_classes={"torchvision": ViTAEImageProcessor, "pil": ViTAEImageProcessorPil},
        exist_ok=True,
    )
AutoModelForPreTraining.register(ViTAEConfig, ViTAEForPreTraining, exist_ok=True)
AutoConfig.register(RCNNConfig.model_type, RCNNConfig, exist_ok=True)
AutoModelForObjectDetection.register(RCNNConfig, RCNNForObjectDetection, exist_ok=True)
AutoModelForImageSegmentation.register(RCNNConfig, RCNNForObjectDetection, exist_ok=True)  # for the pipeline's masks
for names in (MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES):
    names[RCNNConfig.model_type] = RCNNForObjectDetection.__name__  # else these pipelines log that they cannot take it
AutoImageProcessor.register(RCNNConfig, image_processor_classes={"torchvision": RCNNImageProcessor}, exist_ok=True)

__all__ = [
    "PRESETS",
    "RCNNConfig",
    "RCNNForObjectDetection",
    "RCNNImageProcessor",
    "ViTAEBackbone",
    "ViTAEConfig",
    "ViTAEForImageClassification",
    "ViTAEForMaskedImageModeling",
    "ViTAEForPreTraining",
    "ViTAEImageProcessor",
    "ViTAEImageProcessorPil",
    "ViTAEModel",
    "ViTAEPreTrainedModel",
    "ViTAEv2Backbone",
    "ViTAEv2Config",
    "ViTAEv2ForImageClassification",
    "ViTAEv2ForMaskedImageModeling",
    "ViTAEv2Model",
    "ViTAEv2PreTrainedModel",
    "config_from_preset",
    "convert_original_state_dict",
    "detect_preset",
    "find_model",
    "load_original_checkpoint",
    "predict",
    "prepare_for_inference",
]
