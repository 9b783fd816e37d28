# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Torchvision's Faster R-CNN and Mask R-CNN as a model of the library, on any of its backbones.

Shape key: B pictures, H and W their height and width, D boxes found in a picture (as many as in the one with most), K
classes, N objects of a picture.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_rcnn_vitae import RCNNConfig
from .modeling_base_vitae import initialize_every_module
from .modeling_vitae import ViTAEBackbone
from .modeling_vitaev2 import ViTAEv2Backbone


OWN_BACKBONES: dict[str, Any] = {"vitae": ViTAEBackbone, "vitaev2": ViTAEv2Backbone}
FIRST_STRIDE = 4
BOX_SIZE, MASK_SIZE = 7, 14  # of the maps that the heads get of a box


@dataclass
class RCNNOutput(ModelOutput):
    """What [`RCNNForObjectDetection`] gives: losses where there are labels, and what it found, but not in training.

    Attributes:
        loss: sum of `loss_dict`.
        loss_dict: of the proposals (`loss_objectness`, `loss_rpn_box_reg`) and of the heads (`loss_classifier`,
            `loss_box_reg`, `loss_mask`).
        logits: `(B, D, K)`, of the class of a box the logit of its score, of all others minus infinity.
        pred_boxes: `(B, D, 4)` centre, width and height as shares of the picture.
        pred_masks: `(B, D, 28, 28)` from 0 to 1, inside the boxes.
        hidden_states, attentions: of the backbone, when asked for.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class RCNNForObjectDetection(PreTrainedModel):
    """Faster R-CNN, or with `with_masks` Mask R-CNN: a feature pyramid on a backbone, proposals, and heads for boxes.

    The parts behind the backbone are torchvision's, and so are the losses and settings that the configuration does not
    have. In place of torchvision's resizing it takes pictures as an image processor prepares them. Proposals and heads
    stay in float32 where a network is loaded in fewer bits.

    Source: Ren et al. 2015, "Faster R-CNN"; He et al. 2017, "Mask R-CNN"; Lin et al. 2017, "Feature Pyramid Networks".
    """

    config: RCNNConfig
    main_input_name = "pixel_values"
    initialize_weights = initialize_every_module
    input_modalities: tuple[str, ...] = ("image",)  # type: ignore[assignment]  # as the library's own models have it
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer averages those of accumulated batches
    # All attention is the backbone's, which says itself what it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["rpn", "roi_heads"]  # the coordinates of boxes need all its bits

    def __init__(self, config: RCNNConfig):
        from torchvision.models.detection.roi_heads import RoIHeads
        from torchvision.models.detection.rpn import RegionProposalNetwork
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__(config)
        self.num_classes: Any = config.num_labels
        backbone_config: Any = config.backbone_config
        backbone_class = OWN_BACKBONES.get(backbone_config.model_type)
        from_config = AutoBackbone.from_config if backbone_class is None else backbone_class._from_config
        self.backbone = from_config(backbone_config)
        self.neck = FeaturePyramidNetwork(self.backbone.channels, config.hidden_size, LastLevelMaxPool())
        levels = len(self.backbone.channels) + 1
        self.size_divisor: int = FIRST_STRIDE * 2 ** (levels - 1)  # anchors of the last map need whole strides
        self.rpn = RegionProposalNetwork(
            *self._anchors_and_head(levels),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 2000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            *self._box_head(),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            **self._mask_head(),
        )
        self.post_init()

    def _anchors_and_head(self, levels: int) -> tuple[nn.Module, nn.Module]:
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.rpn import RPNHead

        sizes = tuple((self.config.anchor_size * 2**level,) for level in range(levels))
        ratios = tuple(self.config.anchor_ratios)
        return AnchorGenerator(sizes, (ratios,) * levels), RPNHead(self.config.hidden_size, len(ratios))

    def _pooled(self, size: int) -> nn.Module:
        from torchvision.ops import MultiScaleRoIAlign
        from torchvision.ops.poolers import initLevelMapper

        levels = len(self.backbone.channels)
        pool = MultiScaleRoIAlign([str(level) for level in range(levels)], size, sampling_ratio=2)
        # Otherwise it guesses them from its first picture, wrongly if that is padded by much.
        pool.scales = [1 / (FIRST_STRIDE * 2**level) for level in range(levels)]
        first = int(math.log2(FIRST_STRIDE))
        pool.map_levels = initLevelMapper(first, first + levels - 1)
        return pool

    def _box_head(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

        width, hidden = self.config.hidden_size, self.config.head_hidden_size
        predictor = FastRCNNPredictor(hidden, self.num_classes + 1)  # class 0 is none of the classes
        return self._pooled(BOX_SIZE), TwoMLPHead(width * BOX_SIZE**2, hidden), predictor

    def _mask_head(self) -> dict[str, nn.Module]:
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

        if not self.config.with_masks:
            return {}
        width = self.config.hidden_size
        return {
            "mask_roi_pool": self._pooled(MASK_SIZE),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, dilation=1),
            "mask_predictor": MaskRCNNPredictor(width, width, self.num_classes + 1),
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Torchvision's: a fan-out normal distribution for convolutions, narrow ones where boxes are proposed."""
        from torchvision.models.detection.rpn import RPNHead

        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, RPNHead):  # after its convolutions
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    init.normal_(layer.weight, std=0.01)
        else:
            super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> RCNNOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised pictures of any size. They are padded on the right and at the bottom to whole strides.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                1 where a picture is, 0 where it was padded; by default it is everywhere.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                As DETR takes them: of each picture `class_labels` `(N,)`, `boxes` `(N, 4)`, centre, width and height as
                shares of the picture, and with masks `masks` `(N, H, W)`.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return those of the backbone.

        Returns:
            [`RCNNOutput`]: the losses if there are labels, and what was found, but for training with labels.

        Raises:
            ValueError: proposals and heads were cast to fewer bits, a box has no width or height, or the strides of the
                backbone's maps are not 4, 8, 16 and so on.
        """
        from torchvision.models.detection.image_list import ImageList

        dtype = next(self.rpn.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"proposals and heads of an R-CNN compute in float32, got weights in {dtype}: load with"
                " from_pretrained(dtype=…), which leaves these out, or use autocast, in place of casting the network"
            )
        height, width = pixel_values.shape[-2:]
        sizes = [(height, width)] * len(pixel_values)
        if pixel_mask is not None:
            sides = zip(pixel_mask[:, :, 0].sum(1).tolist(), pixel_mask[:, 0].sum(1).tolist())
            sizes = [(int(rows), int(columns)) for rows, columns in sides]
        padding = (0, -width % self.size_divisor, 0, -height % self.size_divisor)
        images = ImageList(nn.functional.pad(pixel_values, padding), sizes)
        shown = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        shown = {name: getattr(self.config, name) if value is None else value for name, value in shown.items()}
        outputs = self.backbone(images.tensors, **shown)
        strides = [images.tensors.shape[-1] / feature_map.shape[-1] for feature_map in outputs.feature_maps]
        if strides != [FIRST_STRIDE * 2**level for level in range(len(strides))]:
            raise ValueError(f"an R-CNN takes maps of strides 4, 8, 16 and so on; those of its backbone are {strides}")
        maps = self.neck(OrderedDict(zip(map(str, range(9)), outputs.feature_maps)))
        check_boxes(labels or [])
        targets = None if labels is None else [as_target(label, size) for label, size in zip(labels, sizes)]
        with torch.autocast(pixel_values.device.type, enabled=False):  # the rest may be computed in fewer bits
            maps = OrderedDict((name, feature_map.to(dtype)) for name, feature_map in maps.items())
            result: dict[str, Any] = {}
            if targets is not None:
                _, losses = self._heads(images, maps, sizes, targets)
                result = {"loss": sum(losses.values()), "loss_dict": losses}
            if targets is None or not self.training:
                found, _ = self._heads(images, maps, sizes, None)
                result |= as_tensors(found, sizes, self.num_classes)
        return RCNNOutput(**result, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _heads(
        self,
        images: Any,
        maps: "OrderedDict[str, torch.Tensor]",
        sizes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """What was found, or losses where there are targets: torchvision's parts give either, by their mode."""
        self.rpn.train(targets is not None)
        self.roi_heads.train(targets is not None)
        proposals, proposal_losses = self.rpn(images, maps, targets)
        found, losses = self.roi_heads(maps, proposals, sizes, targets)
        return found, losses | proposal_losses


def check_boxes(labels: list[dict[str, torch.Tensor]]) -> None:
    """Raise a `ValueError` if a box has no width or height, for which the loss would be no number."""
    for picture, label in enumerate(labels):
        if not (label["boxes"][:, 2:] > 0).all():
            boxes = [box for box in label["boxes"].tolist() if not min(box[2:]) > 0]
            raise ValueError(f"picture {picture} of the batch has a box without width or height: {boxes[0]}")


def as_target(label: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The labels of a picture as torchvision has them: corners in pixels, and classes that count from 1."""
    centre, sides = label["boxes"].float().chunk(2, dim=-1)
    corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=-1)
    target = {"boxes": corners * pixels_of(size, corners), "labels": label["class_labels"] + 1}
    return target | ({"masks": label["masks"].to(torch.uint8)} if "masks" in label else {})


def pixels_of(size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Width, height, width, height: by which shares of a picture become pixels."""
    return torch.tensor([size[1], size[0]] * 2, dtype=like.dtype, device=like.device)


def as_tensors(
    found: list[dict[str, torch.Tensor]], sizes: list[tuple[int, int]], num_labels: int
) -> dict[str, torch.Tensor]:
    """What torchvision found in each picture as tensors of one size, filled up with boxes of score 0."""
    most = max(len(one["scores"]) for one in found)
    like = found[0]["boxes"]
    logits = like.new_full((len(found), most, num_labels), -math.inf)
    boxes = like.new_zeros(len(found), most, 4)
    masks = like.new_zeros(len(found), most, *found[0]["masks"].shape[-2:]) if "masks" in found[0] else None
    for picture, (one, size) in enumerate(zip(found, sizes)):
        count = len(one["scores"])
        corners = one["boxes"] / pixels_of(size, like)
        centre, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        boxes[picture, :count] = torch.cat([centre, sides], dim=-1)
        logits[picture, torch.arange(count), one["labels"] - 1] = one["scores"].to(like.dtype).logit(eps=1e-6)
        if masks is not None:
            masks[picture, :count] = one["masks"][:, 0]
    return {"logits": logits, "pred_boxes": boxes, **({} if masks is None else {"pred_masks": masks})}


RCNNForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")

__all__ = ["RCNNForObjectDetection", "RCNNOutput"]
