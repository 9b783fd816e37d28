"""SegmentationTrainer: whole pictures evaluated, stages frozen, batches accumulated, the authors' schedule."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from dense_networks import BACKBONES, masked_rows
from helpers import images, pyramid_config
from transformers import SegformerImageProcessor

from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.data import SegmentationDataset, collate_masks
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.dense.segmentation.trainer import SegmentationTrainer
from vitae_hf.dense.segmentation.transforms import MaskAugmentationArguments, evaluation_sample, segmentation_transform
from vitae_hf.evaluation.detections import segment
from vitae_hf.evaluation.metrics import MeanIoU
from vitae_hf.training.arguments import ViTAETrainingArguments


def make_trainer(split, output, model=None, short_side: int = 48, **arguments) -> SegmentationTrainer:
    model = model or new_segmenter(BACKBONES["pyramid"](), dict(enumerate("abcdefghijk")), head_channels=8)
    processor = SegformerImageProcessor(size={"shortest_edge": short_side})
    transform = segmentation_transform(MaskAugmentationArguments(short_side, crop_size=32))
    common = {"report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "max_steps": 1}
    return SegmentationTrainer(
        model,
        ViTAETrainingArguments(output_dir=output, **{**common, **arguments}),
        data_collator=collate_masks,
        train_dataset=SegmentationDataset(split, transform, num_labels=11, seed=0),
        eval_dataset=SegmentationDataset(split, lambda *pair: evaluation_sample(processor, *pair), num_labels=11),
        processing_class=processor,
    )


def test_evaluation_is_that_of_whole_pictures_at_the_size_of_their_masks(scenes, tmp_path):
    """Equal to `segment`, which users call, for pictures of different sizes, and in batches where sizes are equal."""
    rows = [(scene["image"], scene["mask"]) for scene in scenes["validation"].select(range(4))]
    rows = [tuple(PIL.Image.open(io.BytesIO(value["bytes"])) for value in row) for row in rows]
    rows = [tuple(value.crop((0, 0, 128 - 9 * number, 90)) for value in row) for number, row in enumerate(rows)]
    trainer = make_trainer(masked_rows(*rows), tmp_path)
    metrics = trainer.evaluate()
    metric = MeanIoU([*"abcdefghijk"])
    for image, mask in rows:
        metric.add_batch(predictions=segment(trainer.model, trainer.processing_class, image), references=np.array(mask))
    expected = metric.compute()
    assert trainer.figures == expected and metrics["eval_mean_iou"] == expected["mean_iou"]
    trainer.args.per_device_eval_batch_size = 4
    with pytest.raises(ValueError, match="pictures or masks of one size, got .*: evaluate one picture at a time"):
        trainer.evaluate()
    losses = [
        make_trainer(
            scenes["validation"].select(range(4)), tmp_path, trainer.model, per_device_eval_batch_size=batch
        ).evaluate()["eval_loss"]
        for batch in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_frozen_stages_keep_weights_and_statistics(backbone_config, scenes, tmp_path):
    model = new_segmenter(backbone_config(frozen_stages=1), dict(enumerate("abcdefghijk")), head_channels=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(scenes["train"], tmp_path, model, max_steps=2, learning_rate=1e-2, weight_decay=0.5).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    prefix = f"backbone.{model.backbone.base_model_prefix}."
    frozen = {name for name in before if name.startswith((f"{prefix}stages.0.", f"{prefix}embeddings."))}
    assert frozen and not changed & frozen
    rest = {name for name, _ in model.named_parameters()} - frozen
    assert {name for name in rest if name.endswith(".weight")} <= changed


def test_accumulated_batches_weigh_as_one(scenes, tmp_path):
    """Twice the same batch gives the gradient of one."""
    weights = []
    for accumulated in (1, 2):
        torch.manual_seed(0)
        model = new_segmenter(
            dense_config(pyramid_config(drop_path_rate=0.0, reduction_dropout_prob=0.0)),
            dict(enumerate("abcdefghijk")),
            head_channels=8,
        )
        options = {
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": accumulated,
        }
        trainer = make_trainer(scenes["train"].select([0] * 4), tmp_path, model, short_side=96, **options)
        trainer.train_dataset.transform = trainer.eval_dataset.transform
        trainer.train()
        weights.append(model.decode_head.classifier.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_the_schedule_is_a_line_to_zero_after_a_warm_up(scenes, tmp_path):
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 0.0}}
    trainer = make_trainer(
        scenes["train"], tmp_path, learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5, warmup_steps=10, **schedule
    )
    trainer.create_optimizer_and_scheduler(110)
    rates = []
    for _ in range(110):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [step / 10 if step < 10 else (110 - step) / 100 for step in range(110)]
    assert [max(row) for row in rates] == pytest.approx([1e-3 * factor for factor in expected])
    assert min(rates[10]) < max(rates[10]) / 8  # layer-wise decay finds the cells inside UperNet
    undecayed = [group for group in trainer.optimizer.param_groups if not group["weight_decay"]]
    assert all(parameter.ndim == 1 for group in undecayed for parameter in group["params"])


def test_a_batch_of_one_is_refused_before_batch_norm_fails(scenes, tmp_path):
    with pytest.raises(ValueError, match="at least 2 pictures per device .* got per_device_train_batch_size 1"):
        make_trainer(scenes["train"], tmp_path, per_device_train_batch_size=1)


def test_masks_that_say_nothing_move_nothing(scenes, tmp_path):
    """The library's mean over no pixels would be no number, and end the run."""
    trainer = make_trainer(scenes["train"], tmp_path)
    batch = {"pixel_values": images(), "labels": torch.full((2, 64, 64), 255)}
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0 and not any(parameter.grad.any() for parameter in trainer.model.parameters())


def test_an_interrupted_evaluation_leaves_nothing_behind(scenes, tmp_path):
    trainer = make_trainer(scenes["train"], tmp_path)
    first = trainer.evaluate()
    trainer._iou.add_batch(predictions=torch.ones(9, dtype=int), references=torch.zeros(9, dtype=int))
    assert trainer.evaluate()["eval_mean_iou"] == first["eval_mean_iou"]
