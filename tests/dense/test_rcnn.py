"""Faster and Mask R-CNN on every backbone: equal to torchvision's whole model, trained whole, reloaded, with masks."""

from collections import OrderedDict

import pytest
import torch
from dense_networks import BACKBONES, NAMES, unreached
from helpers import IMAGE, images
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    SwinConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from vitae_hf import (
    RCNNConfig,
    RCNNForObjectDetection,
    RCNNImageProcessor,
    config_from_preset,
    prepare_for_inference,
)
from vitae_hf.dense.detection.models import HeadSize, new_detector
from vitae_hf.evaluation.detections import find_objects
from vitae_hf.modeling_rcnn_vitae import RCNNOutput, as_target


def labels() -> list[dict]:
    """Two objects in the first picture, none in the second."""
    masks = torch.zeros(2, 64, 64)
    masks[0, 16:48, 16:48] = masks[1, :20, 40:] = 1
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.8125, 0.15625, 0.375, 0.3125]])
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": boxes[:0], "masks": masks[:0]}
    return [{"class_labels": torch.tensor([1, 4]), "boxes": boxes, "masks": masks}, nothing]


def network(kind: str = "pyramid", name: str = "mask_rcnn", **settings) -> RCNNForObjectDetection:
    model = new_detector(name, BACKBONES[kind](), NAMES, HeadSize(16))
    for setting, value in settings.items():
        setattr(model.roi_heads, setting, value)
    return model


class WithNeck(torch.nn.Module):
    """What torchvision takes for a backbone."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.neck, self.out_channels = model.backbone, model.neck, model.config.hidden_size

    def forward(self, pixels):
        return self.neck(OrderedDict(zip("0123", self.backbone(pixels).feature_maps)))


def torchvisions(model) -> MaskRCNN:
    """Torchvision's whole model with the same weights, which takes pictures of 64×64 as they are."""
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4)
    heads = {name: getattr(model.roi_heads, name) for name in ("box_roi_pool", "mask_roi_pool", "mask_head")}
    heads |= {"mask_predictor": model.roi_heads.mask_predictor, "box_predictor": model.roi_heads.box_predictor}
    whole = MaskRCNN(
        WithNeck(model),
        rpn_anchor_generator=anchors,
        rpn_head=model.rpn.head,
        box_head=TwoMLPHead(16 * 49, 64),
        min_size=64,
        max_size=64,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        **heads,
    )
    whole.roi_heads.box_head = model.roi_heads.box_head
    return whole.eval()


def test_where_boxes_are_proposed_a_new_network_begins_with_narrow_weights():
    head = network().rpn.head
    layers = [layer for layer in head.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) == 3 and all(0.005 < layer.weight.std() < 0.015 for layer in layers)


@torch.no_grad()
def test_boxes_and_masks_are_those_of_torchvisions_own_model():
    model = network().eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)  # so that it finds several classes
    processor = RCNNImageProcessor()
    expected = torchvisions(model)(list(images()))
    found = processor.post_process_object_detection(model(images()), 0.05, [(64, 64)] * 2)
    for ours, theirs in zip(found, expected):
        assert len(theirs["scores"]) > 10 and len(theirs["labels"].unique()) > 1
        assert torch.equal(ours["labels"], theirs["labels"] - 1)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
        assert (ours["masks"] == (theirs["masks"][:, 0] >= 0.5)).float().mean() > 0.999


def test_losses_are_those_of_torchvisions_own_model():
    model = network()
    boxes = torch.tensor([[16.0, 16, 48, 48], [40, 0, 64, 20]])
    masks = [label["masks"].to(torch.uint8) for label in labels()]
    targets = [{"boxes": boxes, "labels": torch.tensor([2, 5]), "masks": masks[0]}]
    targets += [{"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[1]}]
    whole = torchvisions(model).train()
    model.eval()  # it takes its mode from the labels
    torch.manual_seed(0)
    losses = model(images(), labels=labels()).loss_dict
    torch.manual_seed(0)  # both draw the boxes that they train on
    expected = whole.eval()
    expected.rpn.train(), expected.roi_heads.train()
    maps = expected.backbone(images())
    from torchvision.models.detection.image_list import ImageList

    proposals, first = expected.rpn(ImageList(images(), [(64, 64)] * 2), maps, targets)
    second = expected.roi_heads(maps, proposals, [(64, 64)] * 2, targets)[1]
    for name, value in {**first, **second}.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_labels_of_the_image_processor_are_the_boxes_of_pictures_whatever_they_are_padded_to():
    processor = RCNNImageProcessor(size={"height": 64, "width": 64}, do_resize=False)
    pictures = [Image.new("RGB", size) for size in ((64, 32), (96, 64))]
    box = {"bbox": [10.0, 4.0, 20.0, 16.0], "category_id": 1, "area": 320, "iscrowd": 0}
    annotations = [{"image_id": number, "annotations": [box]} for number in range(2)]
    for padding in ({}, {"pad_size": {"height": 96, "width": 96}}):
        batch = processor(pictures, annotations=annotations, return_tensors="pt", **padding)
        assert batch["pixel_values"].shape[-2:] == ((96, 96) if padding else (64, 96))
        for label, picture in zip(batch["labels"], pictures):
            target = as_target(label, picture.size[::-1])
            torch.testing.assert_close(target["boxes"], torch.tensor([[10.0, 4.0, 30.0, 20.0]]))


def test_an_evaluation_with_labels_gives_losses_and_what_was_found():
    model = network().eval()
    torch.manual_seed(0)
    both, found = model(images(), labels=labels()), model(images())
    assert both.loss == sum(both.loss_dict.values()) > 0 and found.loss is None
    assert torch.equal(both.logits, found.logits) and torch.equal(both.pred_masks, found.pred_masks)
    assert model.train()(images(), labels=labels()).logits is None


def test_what_callers_of_the_library_ask_for_is_given(tmp_path):
    model = network().eval()
    with torch.no_grad():
        outputs = model(images(), output_hidden_states=True)
        logits, boxes, masks = model(images(), return_dict=False)
        expected = model.backbone(images(), output_hidden_states=True).hidden_states
    assert torch.equal(logits, outputs.logits) and torch.equal(boxes, outputs.pred_boxes) and len(masks) == 2
    assert all(torch.equal(one, other) for one, other in zip(outputs.hidden_states, expected, strict=True))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.backbone.config._attn_implementation == implementation
    assert not Trainer(model, TrainingArguments(tmp_path, use_cpu=True)).model_accepts_loss_kwargs


def test_what_would_train_to_nothing_is_refused():
    empty = labels()
    empty[0]["boxes"] = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.5]])
    with pytest.raises(ValueError, match=r"picture 0 of the batch has a box without width or height: \[0.5, 0.5, 0.0"):
        network()(images(), labels=empty)
    last_map_only = RCNNConfig(backbone_config=config_from_preset("vitaev2-nano"), hidden_size=8, head_hidden_size=8)
    with pytest.raises(ValueError, match=r"maps of strides 4, 8, 16 and so on; those of its backbone are \[32.0\]"):
        RCNNForObjectDetection(last_map_only)(images())


@pytest.mark.parametrize("kind, name", [(kind, "mask_rcnn") for kind in BACKBONES] + [("windowed", "faster_rcnn")])
def test_an_rcnn_trains_every_parameter_and_reloads_with_equal_outputs(kind, name, tmp_path):
    model = network(kind, name)
    for _ in range(2):  # the deltas of boxes begin near nothing
        model(images(), labels=labels()).loss.backward()
    assert unreached(model) == []
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, outputs = model.eval()(images()), reloaded(images())
    assert type(reloaded.config.backbone_config) is type(model.config.backbone_config)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_boxes, expected.pred_boxes)
    assert (outputs.pred_masks is None) == (name == "faster_rcnn")


@torch.no_grad()
def test_boxes_have_all_bits_where_the_rest_is_computed_in_fewer():
    model = network(score_thresh=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(), labels=labels()).loss
        found = model.eval()(images())
    assert loss.isfinite() and loss.dtype == found.pred_boxes.dtype == torch.float32 and found.logits.shape[1] > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_loaded_in_fewer_bits_finds_what_it_finds_in_float32(dtype, tmp_path):
    model = network().eval()
    model.save_pretrained(tmp_path)
    half = RCNNForObjectDetection.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype and next(half.roi_heads.parameters()).dtype == torch.float32
    with torch.no_grad():
        found, expected = half(images().to(dtype)), model(images())
    scores = [outputs.logits.amax(-1).sigmoid().sort().values for outputs in (found, expected)]
    torch.testing.assert_close(*scores, atol=0.02, rtol=0)
    assert found.pred_boxes.dtype == torch.float32 and found.pred_masks.isfinite().all()
    prepared = prepare_for_inference(model, dtype=dtype)(images().to(dtype))
    torch.testing.assert_close(prepared.logits.amax(-1).sigmoid().sort().values, scores[1], atol=0.02, rtol=0)
    loss = half.train()(images().to(dtype), labels=labels()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="compute in float32, got weights in .*: load with from_pretrained"):
        half.to(dtype)(images().to(dtype))


@torch.no_grad()
def test_a_smaller_picture_of_a_batch_is_seen_as_it_is_alone():
    model = network(score_thresh=0.0).eval()
    pixels, mask = images(), torch.ones(2, 64, 64, dtype=torch.int64)
    pixels[1, :, :, 40:] = mask[1, :, 40:] = 0
    batch, alone = model(pixels, pixel_mask=mask), model(pixels[1:, :, :, :40])
    count = alone.logits.shape[1]
    assert count > 10 and batch.logits[1, count:].isneginf().all()
    torch.testing.assert_close(batch.pred_boxes[1, :count], alone.pred_boxes[0], rtol=1e-4, atol=1e-4)
    centre, sides = batch.pred_boxes.chunk(2, dim=-1)
    assert (centre + sides / 2).max() <= 1 + 1e-5


def test_a_pixel_belongs_to_the_best_object_and_a_hidden_object_is_left_out():
    masks = torch.ones(1, 3, 28, 28)
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.4, 1.0]]])
    logits = torch.full((1, 3, 4), -torch.inf)
    for box, (label, score) in enumerate([(2, 0.9), (1, 0.7), (3, 0.8)]):
        logits[0, box, label] = torch.tensor(score).logit()
    outputs = RCNNOutput(logits=logits, pred_boxes=boxes, pred_masks=masks)
    settings = {"target_sizes": [(40, 40)], "overlap_mask_area_threshold": 0.4}
    (found,) = RCNNImageProcessor().post_process_instance_segmentation(outputs, 0.5, **settings)
    assert [(one["label_id"], one["id"]) for one in found["segments_info"]] == [(2, 0), (1, 1)]
    inside = found["segmentation"][2:-2, 2:-2]  # masks fade at the edge of their box
    assert (inside[:, :17] == 0).all() and (inside[:, 19:] == 1).all()
    with pytest.raises(ValueError, match="need `target_sizes`, and a model with masks"):
        RCNNImageProcessor().post_process_instance_segmentation(outputs)


def test_a_backbone_of_the_library_works_too(tmp_path):
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=64)
    swin.out_features = ["stage1", "stage2"]
    model = RCNNForObjectDetection(RCNNConfig(backbone_config=swin, hidden_size=8, head_hidden_size=8, num_labels=2))
    model.save_pretrained(tmp_path)
    again = RCNNForObjectDetection.from_pretrained(tmp_path).eval()
    assert again(images()).logits.shape[-1] == 2 and isinstance(again.config.backbone_config, SwinConfig)


def test_a_configuration_that_no_network_can_have_is_refused():
    with pytest.raises(StrictDataclassError, match="`hidden_size` must be at least 1, got 0"):
        RCNNConfig(hidden_size=0)
    with pytest.raises(StrictDataclassError, match="`nms_threshold` must be at least 0 and at most 1, got 2"):
        RCNNConfig(nms_threshold=2)
    with pytest.raises(ValueError, match="RCNNConfig has no field 'with_mask'; did you mean 'with_masks'"):
        RCNNConfig(with_mask=False)
    assert RCNNConfig(id2label=["cat", "dog"]).label2id == {"cat": 0, "dog": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mask R-CNN that finds something everywhere, with its image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rcnn")
    network().save_pretrained(folder)
    RCNNImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(folder)
    return folder


def test_pipelines_give_boxes_and_masks(folder):
    picture = Image.open(IMAGE).convert("RGB")
    detect = pipeline("object-detection", model=str(folder))
    boxes = detect(picture, threshold=0.1)
    own = find_objects(detect.model, AutoImageProcessor.from_pretrained(folder), picture, 0.1)
    assert [box["score"] for box in boxes] == own["scores"].tolist() and len(boxes) > 5
    assert [list(box["box"].values()) for box in boxes] == own["boxes"].int().tolist()
    masks = pipeline("image-segmentation", model=str(folder))(picture, threshold=0.1, overlap_mask_area_threshold=0)
    assert len(masks) > 1 and all(mask["mask"].size == picture.size for mask in masks)
    assert torch.stack([torch.tensor(list(mask["mask"].getdata())) > 0 for mask in masks]).sum(0).max() == 1


def test_pipelines_give_boxes_of_a_network_without_masks(tmp_path):
    network(name="faster_rcnn").save_pretrained(tmp_path)
    RCNNImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(tmp_path)
    found = pipeline("object-detection", model=str(tmp_path))(Image.open(IMAGE).convert("RGB"), threshold=0.1)
    assert len(found) > 5


@torch.no_grad()
def test_boxes_are_pooled_at_the_scale_of_the_maps_whatever_came_first():
    """Torchvision's pooling guesses the scale from the first picture; 80 of 128 padded rows would mislead it."""
    model = network().eval()
    picture = images(1, 128, 128)
    expected = model(picture).logits
    torch.manual_seed(0)
    other = network().eval()
    other.load_state_dict(model.state_dict())
    other(images(1, 80, 128))
    assert torch.equal(other(picture).logits, expected)
    assert other.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16]
