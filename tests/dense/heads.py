"""The library's heads on tiny backbones of every kind. Run as a script it prints the table of docs/dense.md."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from helpers import class_token_config, images, pyramid_config
from transformers import AutoBackbone

from vitae_hf import config_from_preset


BACKBONES = {
    "ViTAE": lambda **changes: pyramid_config(drop_path_rate=0.0, **changes),
    "ViTAEv2": lambda **changes: config_from_preset("vitaev2-nano", **changes),
    "class token, a stage a cell": lambda **changes: class_token_config(
        depths=(4,), drop_path_rate=0.0, cell_stages=True, **changes
    ),
    "class token, feature pyramid": lambda **changes: class_token_config(
        drop_path_rate=0.0, feature_pyramid_channels=16, **changes
    ),
}
V1, V2, CELLS, PYRAMID = BACKBONES
STAGES = ["stage1", "stage2", "stage3", "stage4"]
MAPS = {V1: STAGES[:3], V2: STAGES, CELLS: STAGES, PYRAMID: ["p2", "p3", "p4", "p5"]}
MAP_OF_STRIDE_16 = {V1: "stage3", V2: "stage3", CELLS: "stage4", PYRAMID: "p4"}
TOKENS, BARE_TOKENS = "tokens", "tokens without the class token"


def backbone_config(kind: str, takes: str):
    """The configuration of a backbone that gives what a head takes, or else its maps."""
    names, changes = MAPS[kind], {}
    if takes == "the last three maps":
        names = names[-3:]
    elif takes in ("the last map", BARE_TOKENS):
        names = names[-1:]
    elif takes == "the map of stride 16":
        names, changes = [MAP_OF_STRIDE_16[kind]], {"num_channels": 4}  # a picture and its trimap
    if kind == CELLS and takes in (TOKENS, BARE_TOKENS):
        changes = {"reshape_hidden_states": False, "return_class_token": takes == TOKENS, "apply_layernorm": True}
    if takes == BARE_TOKENS:
        changes["image_size"] = (64, 64)
    return BACKBONES[kind](out_features=names, **changes)


def picture() -> dict[str, Any]:
    return {"pixel_values": images(2)}


def with_trimap() -> dict[str, Any]:
    return {"pixel_values": torch.cat([images(2), torch.rand(2, 1, 64, 64)], 1)}


def with_classes() -> dict[str, Any]:
    return {**picture(), "labels": torch.randint(0, 5, (2, 64, 64))}


def with_masks() -> dict[str, Any]:
    left_and_right = torch.eye(2).repeat_interleave(32, 1)[:, None].repeat(1, 64, 1)
    return {**picture(), "mask_labels": [left_and_right] * 2, "class_labels": [torch.tensor([1, 2])] * 2}


def with_masks_and_text() -> dict[str, Any]:
    task, queries = torch.randint(1, 40, (2, 8)), torch.randint(1, 40, (2, 4, 8))
    return {**with_masks(), "task_inputs": task, "text_inputs": queries}


def with_boxes() -> dict[str, Any]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4]])
    return {**picture(), "labels": [{"class_labels": torch.tensor([1, 2]), "boxes": boxes}] * 2}


def with_boxes_and_text() -> dict[str, Any]:
    prompt = [101, 7, 1012, 8, 1012, 9, 1012, 102]  # [CLS] a . b . c . [SEP]
    return {**with_boxes(), "input_ids": torch.tensor([prompt] * 2)}


def detr(channels: list[int]) -> dict[str, Any]:
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return {**layers, **widths, "num_queries": 6, "num_labels": 5}


def dab_detr(channels: list[int]) -> dict[str, Any]:
    fields = detr(channels)
    return {**fields, "hidden_size": fields.pop("d_model")}


def rt_detr(channels: list[int]) -> dict[str, Any]:
    hybrid = {"encoder_hidden_dim": 32, "encoder_in_channels": channels, "decoder_in_channels": [32] * 3}
    return {**detr(channels), **hybrid, "num_denoising": 4, "freeze_backbone_batch_norms": False}


def grounding_dino(channels: list[int]) -> dict[str, Any]:
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=1024, max_position_embeddings=16, **layers)
    return {**detr(channels), "text_config": bert, "max_text_len": 16, "fusion_droppath": 0.0}


def upernet(channels: list[int]) -> dict[str, Any]:
    auxiliary = {"auxiliary_in_channels": channels[2], "auxiliary_channels": 8}
    return {"num_labels": 5, "hidden_size": 16, **auxiliary}


def maskformer(channels: list[int]) -> dict[str, Any]:
    decoder = transformers.DetrConfig(**detr(channels))
    return {"num_labels": 5, "fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": decoder}


def masked_attention(channels: list[int]) -> dict[str, Any]:
    layers = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "num_queries": 6, "num_labels": 5}
    return {**layers, "hidden_dim": 64, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "train_num_points": 64}


def mask2former(channels: list[int]) -> dict[str, Any]:
    strides = [4, 8, 16, 32][: len(channels)]
    return {**masked_attention(channels), "feature_size": 64, "mask_feature_size": 64, "feature_strides": strides}


def oneformer(channels: list[int]) -> dict[str, Any]:
    names = {"width": 64, "context_length": 8, "num_layers": 1, "vocab_size": 50, "n_ctx": 2}
    text = {f"text_encoder_{name}": value for name, value in names.items()} | {"task_seq_len": 8, "is_training": True}
    strides = [4, 8, 16, 32][: len(channels)]
    # Its dropout follows `is_training` of the configuration, in evaluation mode too.
    return {**masked_attention(channels), **text, "conv_dim": 64, "mask_dim": 64, "strides": strides, "dropout": 0.0}


def vitmatte(channels: list[int]) -> dict[str, Any]:
    return {"hidden_size": channels[0], "convstream_hidden_sizes": [4, 8, 8], "fusion_hidden_sizes": [8] * 4}


def dpt(channels: list[int]) -> dict[str, Any]:
    return {"fusion_hidden_size": 16, "neck_hidden_sizes": [8] * len(channels)}


def depth_anything(channels: list[int]) -> dict[str, Any]:
    return {**dpt(channels), "reassemble_hidden_size": channels[0], "patch_size": 16, "head_hidden_size": 8}


def zoedepth(channels: list[int]) -> dict[str, Any]:
    widths = {"num_relative_features": 8, "bottleneck_features": 16, "bin_embedding_dim": 8}
    bins = {"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "rooms"}
    return {**dpt(channels), **widths, "num_attractors": [4, 2, 1, 1], "bin_configurations": [bins]}


def vitpose(channels: list[int]) -> dict[str, Any]:
    return {"num_labels": 17}


@dataclass
class Head:
    """A head of the library.

    Attributes:
        model: the name of its class.
        takes: what of the backbone.
        fields: of its configuration, given the widths of the maps.
        inputs: what it is called with, labels among them if it has a loss.
        unused: a pattern of its own weights that no gradient reaches, whatever the backbone.
    """

    model: str
    takes: str
    fields: Callable[[list[int]], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]
    unused: str = "nothing"

    def build(self, kind: str) -> transformers.PreTrainedModel:
        config = backbone_config(kind, self.takes)
        channels = AutoBackbone.from_config(config).channels
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(backbone_config=config, **self.fields(channels)))


ZEROS = r"decoder\.layers\.0\.self_attn\."  # the attention of the first layer among queries that are still zeros
FIRST = r"neck\.fusion_stage\.layers\.0\.residual_layer1\."  # the first fusion has nothing to fuse with
CONSTANTS = r"model\.decoder\.(reg_scale|up)$"
PROPOSALS = r"model\.(enc_output|encoder_output_)"  # are chosen by their scores, which the loss does not see
HEADS = {
    "UperNet": Head("UperNetForSemanticSegmentation", "all maps", upernet, with_classes),
    "MaskFormer": Head("MaskFormerForInstanceSegmentation", "all maps", maskformer, with_masks, ZEROS),
    "Mask2Former": Head("Mask2FormerForUniversalSegmentation", "all maps", mask2former, with_masks),
    "OneFormer": Head("OneFormerForUniversalSegmentation", "all maps", oneformer, with_masks_and_text),
    "DETR": Head("DetrForObjectDetection", "the last map", detr, with_boxes, ZEROS),
    "Conditional DETR": Head("ConditionalDetrForObjectDetection", "the last map", detr, with_boxes, ZEROS),
    "DAB-DETR": Head("DabDetrForObjectDetection", "the last map", dab_detr, with_boxes, ZEROS),
    "Deformable DETR": Head("DeformableDetrForObjectDetection", "the last three maps", detr, with_boxes),
    "RT-DETR": Head("RTDetrForObjectDetection", "the last three maps", rt_detr, with_boxes),
    "RT-DETR v2": Head("RTDetrV2ForObjectDetection", "the last three maps", rt_detr, with_boxes),
    "D-FINE": Head("DFineForObjectDetection", "the last three maps", rt_detr, with_boxes, CONSTANTS),
    "Grounding DINO": Head(
        "GroundingDinoForObjectDetection", "the last three maps", grounding_dino, with_boxes_and_text, PROPOSALS
    ),
    "VitMatte": Head("VitMatteForImageMatting", "the map of stride 16", vitmatte, with_trimap),
    "DPT": Head("DPTForDepthEstimation", TOKENS, dpt, picture, FIRST),
    "Depth Anything": Head("DepthAnythingForDepthEstimation", TOKENS, depth_anything, picture, FIRST),
    "ZoeDepth": Head("ZoeDepthForDepthEstimation", TOKENS, zoedepth, picture, FIRST),
    "VitPose": Head("VitPoseForPoseEstimation", BARE_TOKENS, vitpose, picture),
}


@dataclass
class Failure:
    """What does not work: a sentence for people, and a pattern of the library's message."""

    sentence: str
    message: str


ONE_SIZE = Failure(
    "It joins each map with one of half its size, and the maps of all cells have one size: take the feature pyramid.",
    "Sizes of tensors must match except in dimension 1. Expected size 8 but got size 4",
)
NO_TOKENS = Failure(
    "It takes the tokens of a plain network, and this backbone gives maps.",
    r"too many values to unpack|Sizes of tensors must match except in dimension 0|permute\(sparse_coo\)",
)


def failure(name: str, kind: str) -> Failure | None:
    """Why this head does not work on this backbone."""
    if name in ("RT-DETR", "RT-DETR v2", "D-FINE") and kind == CELLS:
        return ONE_SIZE
    if HEADS[name].takes not in (TOKENS, BARE_TOKENS) or kind == CELLS:
        return None
    return NO_TOKENS


def unasked(config) -> str:
    """A pattern of the weights of a backbone behind the last map that is asked for, or of levels that are not."""
    stages = [f"stages.{config.stage_names.index(name) - 1}." for name in config.out_features if "stage" in name]
    later = range(int(stages[-1].split(".")[1]) + 1, 9) if stages and not config.is_plain else ()
    names = getattr(config, "feature_pyramid_names", [])
    levels = [f"levels.{index}." for index, name in enumerate(names) if name not in config.out_features]
    return "|".join(map(re.escape, [f"stages.{index}." for index in later] + levels)) or "nothing"


def table() -> str:
    """The table of docs/dense.md, and a sentence for each reason."""
    reasons: list[str] = []
    lines = [f"| | takes | {' | '.join(BACKBONES)} |", "|---" * (2 + len(BACKBONES)) + "|"]
    for name, head in HEADS.items():
        cells = [name, head.takes]
        for kind in BACKBONES:
            reason = failure(name, kind)
            if reason and reason.sentence not in reasons:
                reasons.append(reason.sentence)
            cells.append(f"no ({reasons.index(reason.sentence) + 1})" if reason else "yes")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}" for number, sentence in enumerate(reasons, 1))]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
