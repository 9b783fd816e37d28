"""Heads of the library on every backbone: they train whole and reload, or fail as the table in the docs says."""

import re

import PIL.Image
import pytest
import torch
from dense_networks import unreached
from heads import BACKBONES, CELLS, HEADS, failure, table, unasked
from helpers import IMAGE, REPOSITORY, rotated_config
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor, ZoeDepthImageProcessor, pipeline


def outputs_of(model, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and "loss" not in name}


def train_two_steps(model, inputs) -> None:
    """By its loss or, without one, its outputs; some heads begin with zeros, which let no gradient through at first."""
    optimizer = torch.optim.AdamW(model.train().parameters())
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(**inputs)
        loss = outputs.loss if any("labels" in name for name in inputs) else outputs.to_tuple()[0].square().sum()
        loss.backward()
        optimizer.step()


def assert_works(name, kind, folder):
    """It trains every weight, and gives the same after it was saved and loaded."""
    torch.manual_seed(0)
    head = HEADS[name]
    model, inputs = head.build(kind), head.inputs()
    for weight, parameter in model.named_parameters():
        if "DepthEstimation" in head.model and "head" in weight and weight.endswith("bias"):
            nn.init.constant_(parameter, 0.5)  # depths begin above zero, so that the last ReLU lets gradients through
    train_two_steps(model, inputs)
    backbone = model.config.backbone_config
    expected = [re.compile(pattern) for pattern in (head.unused, unasked(backbone))]
    assert [weight for weight in unreached(model) if not any(pattern.search(weight) for pattern in expected)] == []
    found = outputs_of(model, inputs)
    model.save_pretrained(folder)
    reloaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert type(reloaded.config.backbone_config) is type(backbone)
    again = outputs_of(reloaded, inputs)
    assert found and found.keys() == again.keys()
    for output, value in found.items():
        torch.testing.assert_close(again[output], value, rtol=1e-5, atol=1e-6)


def test_the_table_in_the_docs_is_that_of_the_heads():
    page = (REPOSITORY / "docs" / "dense.md").read_text()
    assert table() in page, "put what `PYTHONPATH=tests python tests/dense/heads.py` prints into docs/dense.md"


@pytest.mark.parametrize("name", ["DPT", "VitPose"])
def test_heads_for_depth_and_pose_work_on_the_cells_of_a_plain_variant(name, tmp_path):
    assert_works(name, CELLS, tmp_path)


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("DPT", DPTImageProcessor(size={"height": 64, "width": 96})),
        ("Depth Anything", DPTImageProcessor(size={"height": 60, "width": 90}, ensure_multiple_of=16)),
        ("ZoeDepth", ZoeDepthImageProcessor(size={"height": 64, "width": 96})),  # which makes 66 × 96 of the picture
    ],
)
def test_a_saved_folder_estimates_the_depth_of_a_picture(name, processor, tmp_path):
    HEADS[name].build(CELLS).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with PIL.Image.open(IMAGE) as picture:
        depth = pipeline("depth-estimation", str(tmp_path))(picture)["predicted_depth"]
        assert depth.shape == picture.size[::-1] and depth.isfinite().all()


def test_heads_for_depth_need_a_class_token():
    backbone = rotated_config(cell_stages=True, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    head = DPTForDepthEstimation(DPTConfig(backbone_config=backbone, **HEADS["DPT"].fields([32, 32])))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        head(**HEADS["DPT"].inputs())


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", HEADS)
def test_each_head_works_on_each_backbone_or_fails_as_the_table_says(name, kind, tmp_path):
    reason = failure(name, kind)
    if reason is None:
        assert_works(name, kind, tmp_path)
        return
    with pytest.raises((AttributeError, RuntimeError, ValueError), match=reason.message):
        HEADS[name].build(kind)(**HEADS[name].inputs())
