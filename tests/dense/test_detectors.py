"""RT-DETR on every backbone trains whole, reloads, and learns a batch of scenes by heart."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from dense_networks import BACKBONES, assert_reloads, unreached
from torchvision.ops import box_iou
from transformers import AutoBackbone, RTDetrConfig, RTDetrForObjectDetection, SegformerImageProcessor

from vitae_hf import config_from_preset
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.detection.models import DETECTORS, HeadSize, detector_backbone, make_processor, new_detector
from vitae_hf.evaluation.detections import find_objects


def detector(backbone_config) -> RTDetrForObjectDetection:
    channels = AutoBackbone.from_config(backbone_config).channels[:3]
    config = RTDetrConfig(
        backbone_config=backbone_config,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=channels,
        feat_strides=[4, 8, 16],
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32] * 3,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_layers=2,
        decoder_n_points=2,
        num_queries=20,
        num_denoising=10,
        num_labels=11,
    )
    return RTDetrForObjectDetection(config)


def boxed_scenes(split, rows: list[int]) -> tuple[torch.Tensor, list[dict]]:
    """Pictures and, as centre, width and height over the picture's, the boxes of their objects."""
    pixels, labels = [], []
    processor = SegformerImageProcessor(do_resize=False)
    for row in split.cast_column("image", datasets.Image()).select(rows):
        width, height = row["image"].size
        boxes = torch.tensor(row["objects"]["bbox"])
        boxes[:, :2] += boxes[:, 2:] / 2
        pixels.append(processor(row["image"], return_tensors="pt").pixel_values[0])
        boxes = boxes / torch.tensor([width, height, width, height])
        labels.append({"class_labels": torch.tensor(row["objects"]["category"]), "boxes": boxes})
    return torch.stack(pixels), labels


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_a_detector_trains_every_parameter_and_reloads_with_equal_outputs(kind, scenes, tmp_path):
    changes = {"out_features": ["p2", "p3", "p4"]} if kind == "class_token" else {}
    model = detector(BACKBONES[kind](**changes))
    pixels, labels = boxed_scenes(scenes["train"], [0, 1])
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):  # the heads begin with zeros, which let no gradient through in the first step
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    assert [name for name in unreached(model) if "levels.3." not in name] == []  # stride 32 is not asked for
    assert_reloads(model, tmp_path, pixels)


@pytest.mark.slow
def test_a_detector_overfits_one_batch_of_scenes(scenes):
    """Every object is among its most certain boxes, twice as many as there are objects, by class and place."""
    pixels, labels = boxed_scenes(scenes["train"], [0, 1])
    model = detector(dense_config(config_from_preset("vitae-nano")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [180], gamma=0.2)
    losses = []
    for _ in range(220):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < losses[0] / 2
    with torch.no_grad():
        outputs = model.eval()(pixels)
    overlaps = []
    for scores, boxes, expected in zip(outputs.logits.sigmoid(), outputs.pred_boxes, labels):
        confidence, classes = scores.max(-1)
        best = confidence.topk(2 * len(expected["boxes"])).indices
        assert classes[confidence.argmax()] in expected["class_labels"]
        for box, label in zip(expected["boxes"], expected["class_labels"]):
            same = boxes[best[classes[best] == label]]
            overlaps.append(box_iou(same, box[None], fmt="cxcywh").max().item() if len(same) else 0.0)
    assert min(overlaps) > 0.4 and np.mean(overlaps) > 0.8  # above 0.5 and 0.9 with each of five seeds


@pytest.mark.parametrize("name, maps", [("rt_detr", [2, 3, 4]), ("mask_rcnn", [1, 2, 3, 4])])
def test_a_detector_takes_the_last_maps_of_a_backbone_or_all(name, maps):
    config = detector_backbone(config_from_preset("vitaev2-nano"), name)
    assert config.out_features == [f"stage{number}" for number in maps]
    asked = detector_backbone(config_from_preset("vitaev2-nano"), name, out_features=["stage1", "stage2", "stage3"])
    assert asked.out_features == ["stage1", "stage2", "stage3"]


def test_rt_detr_trains_the_batch_norms_of_its_backbone():
    """The library would put others in their place, which keep their statistics."""
    config = detector_backbone(config_from_preset("vitae-nano"), "rt_detr")
    backbone = new_detector("rt_detr", config, {0: "a"}, HeadSize(32, 1, 5)).model.backbone
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())


def test_a_detector_in_half_precision_gives_scores_and_boxes_in_whole():
    config = detector_backbone(config_from_preset("vitae-nano"), "rt_detr")
    model = new_detector("rt_detr", config, {0: "a", 1: "b"}, HeadSize(32, 1, 5)).bfloat16()
    processor = make_processor("rt_detr", {"height": 64, "width": 64})
    found = find_objects(model, processor, PIL.Image.new("RGB", (40, 30)), threshold=0.0)
    assert found["scores"].dtype == found["boxes"].dtype == torch.float32 and len(found["scores"]) == 5


@pytest.mark.parametrize("name", ["rt_detr", "deformable_detr"])
def test_a_new_head_begins_with_the_weights_of_the_librarys_own(name, monkeypatch):
    backbone, kind = detector_backbone(config_from_preset("vitae-nano"), name), DETECTORS[name]
    own = {"config_class": kind.config_class.__base__, "model_class": kind.model_class.__base__}
    states = []
    for detector_kind in (kind, kind._replace(**own)):
        monkeypatch.setitem(DETECTORS, name, detector_kind)
        torch.manual_seed(0)
        states.append(new_detector(name, backbone, {0: "a", 1: "b"}, HeadSize(64, 2, 20)).state_dict())
    assert all(torch.equal(states[0][weight], value) for weight, value in states[1].items())
