"""Dense prediction: ViTAE as the backbone of a segmenter and of a detector, and vitae segment."""

import io
import json

import build_garment_scenes
import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
import yaml
from helpers import ASSETS, REPOSITORY, class_token_config, images, last_line, pyramid_config, run, windowed_config
from huggingface_hub import ModelCard
from torchvision import tv_tensors
from torchvision.ops import box_iou
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SegformerImageProcessor,
    UperNetForSemanticSegmentation,
    pipeline,
)

from vitae_hf import PRESETS, ViTAEBackbone, ViTAEForImageClassification, ViTAEForPreTraining, config_from_preset
from vitae_hf.commands import segment as segment_command
from vitae_hf.dense.data import SegmentationDataset, collate_masks, load_masked_images, mask_class_names
from vitae_hf.dense.figures import class_colours, draw_overlays
from vitae_hf.dense.model import dense_config, load_segmenter, new_segmenter, segment
from vitae_hf.dense.trainer import SegmentationTrainer
from vitae_hf.dense.transforms import (
    ColourDistortion,
    MaskAugmentationArguments,
    VariedCrop,
    evaluation_sample,
    segmentation_transform,
)
from vitae_hf.evaluation.metrics import MeanIoU
from vitae_hf.files import RECIPES
from vitae_hf.training.arguments import ViTAETrainingArguments


SCENES = REPOSITORY / "examples" / "garment_scenes"
NAMES = dict(enumerate("abcde"))
BACKBONES = {
    "pyramid": lambda **changes: dense_config(pyramid_config(drop_path_rate=0.0), **changes),
    "class_token": lambda **changes: dense_config(
        class_token_config(drop_path_rate=0.0), feature_pyramid_channels=16, **changes
    ),
    "windowed": lambda **changes: dense_config(windowed_config(drop_path_rate=0.0), **changes),
}


@pytest.fixture(params=list(BACKBONES))
def backbone_config(request):
    """A function that makes the tiny backbone's configuration of either kind, with changes."""
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def scenes():
    return load_masked_images(str(SCENES))


# ---------------------------------------------------------------------------------------- inside UperNet and RT-DETR


def unreached(model) -> list[str]:
    """Parameters that got no gradient; but for the biases that BatchNorm takes back at once."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or (parameter.ndim > 1 and not parameter.grad.any())
    ]


def assert_reloads(model, folder, *inputs):
    """The same weights to the bit; logits to rounding, since kernels may depend on where a file's tensors lie."""
    model.eval()
    model.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        expected, outputs = model(*inputs), reloaded(*inputs)
    weights = reloaded.state_dict()
    assert all(torch.equal(weights.pop(name), tensor) for name, tensor in model.state_dict().items()) and not weights
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-5 * expected.logits.std().item())


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_upernet_trains_every_parameter_and_reloads_with_equal_outputs(backbone_config, size, tmp_path):
    model = new_segmenter(backbone_config(), NAMES, head_channels=16)
    outputs = model(images(2, *size), labels=torch.randint(0, 5, (2, *size)))
    assert outputs.logits.shape == (2, 5, *size)
    outputs.loss.backward()
    assert unreached(model) == []
    assert_reloads(model, tmp_path, images(2, *size))
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path).backbone) is type(model.backbone)


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith(("-l", "-h"))])
def test_every_preset_is_a_backbone_of_upernet(preset):
    config = dense_config(config_from_preset(preset))
    with torch.device("meta"):
        model = new_segmenter(config, NAMES, head_channels=8)
    first = config.total_stride // 4 if config.has_class_token else 4
    strides = [first * 2**level for level in range(len(model.backbone.channels))]
    maps = model.backbone(torch.empty(1, 3, 64, 64, device="meta")).feature_maps
    assert [tuple(feature_map.shape[1:]) for feature_map in maps] == [
        (channels, 64 // stride, 64 // stride) for channels, stride in zip(model.backbone.channels, strides)
    ]


def test_a_backbone_begins_with_a_classifiers_weights(tmp_path):
    classifier = ViTAEForImageClassification(pyramid_config()).eval()
    classifier.save_pretrained(tmp_path)
    backbone = ViTAEBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage3"]).eval()
    with torch.no_grad():
        maps = backbone(images()).feature_maps
        expected = classifier(images(), output_hidden_states=True).hidden_states[2:]
    assert all(torch.equal(*pair) for pair in zip(maps, expected))
    built = AutoBackbone.from_config(backbone.config)
    assert built.load_state_dict(backbone.state_dict()) and built.channels == backbone.channels == [24, 32]


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


# ------------------------------------------------------------------------------------------------- pictures and masks


def test_the_shipped_scenes_are_what_the_script_renders(scenes):
    split = datasets.load_dataset("parquet", data_files=str(build_garment_scenes.SOURCE / "test-*.parquet"))["train"]
    generator = np.random.default_rng([0, 1])
    for row in scenes["validation"].select(range(3)):
        rendered = build_garment_scenes.render_scene(generator, split)
        assert rendered["objects"] == row["objects"]
        masks = [PIL.Image.open(io.BytesIO(mask["bytes"])) for mask in (rendered["mask"], row["mask"])]
        assert np.array_equal(*map(np.asarray, masks))
    assert mask_class_names(scenes)[0] == "background" and len(mask_class_names(scenes)) == 11


def masked_rows(*rows: tuple) -> datasets.Dataset:
    """A split of pictures and masks, given as arrays or PIL images."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = [
        {"image": PIL.Image.fromarray(np.asarray(image)), "mask": PIL.Image.fromarray(np.asarray(mask))}
        for image, mask in rows
    ]
    split = datasets.Dataset.from_list(rows, features=features)
    return split.cast_column("image", datasets.Image(decode=False)).cast_column("mask", datasets.Image(decode=False))


def test_pictures_and_masks_are_augmented_together():
    """In a picture that is its mask, they stay the same: scaled, cropped, filled up and mirrored alike."""
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (6, 9)), np.ones((10, 10))).astype(np.uint8)
    split = masked_rows((np.repeat(100 * mask[..., None], 3, -1), mask))
    arguments = MaskAugmentationArguments(short_side=60, crop_size=64, max_class_share=0.6, distortion_prob=0)
    data = SegmentationDataset(split, segmentation_transform(arguments), num_labels=3, seed=0)
    drawn = []
    for epoch in range(8):
        data.set_epoch(epoch)
        sample = data[0]
        drawn.append(sample["labels"])
        assert torch.equal(sample["labels"], data[0]["labels"]) and sample["labels"].shape == (64, 64)
        red = (sample["pixel_values"][0] * 0.229 + 0.485) * 255
        known = sample["labels"] != 255
        agreement = ((red / 100 - sample["labels"]).abs() < 0.5)[known].double().mean()
        assert agreement > 0.85  # but where colours blend at edges
        assert (sample["labels"][known].bincount() / known.sum()).max() <= 0.6
    assert any((labels == 255).any() for labels in drawn) and not torch.equal(drawn[0], drawn[1])


def test_a_crop_with_too_much_of_one_class_is_drawn_again():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 20:32] = 1
    crop = VariedCrop(16, max_class_share=0.75, fill=(0, 0, 0))
    crops = [crop(tv_tensors.Image(torch.zeros(3, 40, 40)), tv_tensors.Mask(mask))[1] for _ in range(40)]
    varied = [0.25 <= labels.double().mean() <= 0.75 for labels in crops]
    assert sum(varied) >= 38  # ten draws; less than half of them would be


def test_a_crop_of_one_class_alone_is_taken_when_there_is_no_other():
    split = masked_rows((np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), np.uint8)))
    transform = segmentation_transform(MaskAugmentationArguments(short_side=40, crop_size=16))
    assert (SegmentationDataset(split, transform, num_labels=2)[0]["labels"] == 1).all()


def test_colours_are_distorted_but_not_exchanged():
    red = tv_tensors.Image(torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    distorted = [ColourDistortion(p=1.0)(red).float().mean((1, 2)) for _ in range(50)]
    assert all(colour.argmax() == 0 for colour in distorted) and len({tuple(c.tolist()) for c in distorted}) > 40


def test_a_picture_that_is_stored_turned_is_refused_since_its_mask_is_not():
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 3
    turned = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(turned, "JPEG", exif=exif)
    mask = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(mask, "PNG")
    rows = [{"image": {"bytes": turned.getvalue(), "path": None}, "mask": {"bytes": mask.getvalue(), "path": None}}]
    with pytest.raises(ValueError, match="row 0: its EXIF orientation is 3.*save the picture upright"):
        SegmentationDataset(rows, None, num_labels=2).read(0)


def test_class_names_are_neither_empty_nor_there_twice(tmp_path):
    (tmp_path / "names.txt").write_text("wall\nsky\n\n")
    assert mask_class_names({}, tmp_path / "names.txt") == {0: "wall", 1: "sky"}
    (tmp_path / "names.txt").write_text("wall\n\nsky\nwall\n")
    with pytest.raises(ValueError, match="line 2 of .*names.txt must be the name of one more class, got ''"):
        mask_class_names({}, tmp_path / "names.txt")


def test_labels_are_reduced_as_in_ade20k():
    split = masked_rows((np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [3, 255]], np.uint8)))
    data = SegmentationDataset(split, None, num_labels=3, reduce_labels=True)
    assert data.read(0)[1].tolist() == [[255, 0], [2, 255]]


def test_bad_masks_are_named_with_what_was_expected():
    picture, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    too_high = mask.copy()
    too_high[0] = 7
    for bad, message in [
        (
            (picture, too_high),
            "mask of row 1 has the value 7, and 6 pixels .* there are 5 classes, counted from 0, and 255",
        ),
        ((picture, mask[:, :5]), "row 1 has 6×4 pixels, but its mask 5×4"),
        ((picture, picture), "the mask of row 1: a mask has one channel, a class at each pixel; this one is RGB"),
    ]:
        data = SegmentationDataset(masked_rows((picture, mask), bad), None, num_labels=5)
        with pytest.raises(ValueError, match=message):
            data.check()
    with pytest.raises(ValueError, match="there can be 255 classes at most, got 256"):
        SegmentationDataset(masked_rows((picture, mask)), None, num_labels=256)


@pytest.mark.parametrize("folders", [("train", "validation"), ("Training", "Val")])
def test_pictures_in_a_folder_with_metadata_are_read(tmp_path, folders):
    for split in folders:
        (tmp_path / split / "masks").mkdir(parents=True)
        PIL.Image.new("RGB", (4, 3)).save(tmp_path / split / "a.jpg")
        mask = PIL.Image.fromarray(np.array([[0, 1, 1, 255]] * 3, np.uint8))
        mask.putpalette(list(range(256)) * 3)  # indices count, not colours
        mask.save(tmp_path / split / "masks" / "a.png")
        row = {"file_name": "a.jpg", "mask_file_name": "masks/a.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    data = load_masked_images(str(tmp_path))
    assert set(data) == {"train", "validation"}
    assert SegmentationDataset(data["train"], None, num_labels=2).read(0)[1].tolist() == [[0, 1, 1, 255]] * 3


def test_missing_columns_and_names_are_named(tmp_path):
    picture = PIL.Image.new("RGB", (4, 4))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list([{"image": picture, "label": 1}], features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"one column of pictures for the masks, called one of mask, .* has none among"
    ):
        load_masked_images(str(tmp_path))
    masked = masked_rows((np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)))
    masked.rename_column("mask", "annotation").to_parquet(tmp_path / "a.parquet")
    data = load_masked_images(str(tmp_path))
    assert list(data["train"].features) == ["image", "mask"]
    with pytest.raises(ValueError, match="give a file with the name of a class on each line"):
        mask_class_names(data)
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    assert mask_class_names(data, tmp_path / "names.txt") == {0: "sky", 1: "sea"}


# ------------------------------------------------------------------------------------------------ training by Trainer


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


def test_a_segmenter_begins_with_a_classifier_or_goes_on_as_it_was(tmp_path):
    classifier = ViTAEForImageClassification(class_token_config())
    classifier.save_pretrained(tmp_path / "classifier")
    model = load_segmenter(tmp_path / "classifier", NAMES, 16, feature_pyramid_channels=16, frozen_stages=1)
    expected = classifier.vitae.stages[0].normal_cells[1].mlp.fc1.weight
    assert torch.equal(model.backbone.vitae.stages[0].normal_cells[1].mlp.fc1.weight, expected)
    assert not model.backbone.vitae.stages[0].normal_cells[1].mlp.fc1.weight.requires_grad
    model.save_pretrained(tmp_path / "segmenter")
    again = load_segmenter(tmp_path / "segmenter", {0: "x", 1: "y"}, frozen_stages=0)
    assert again.config.num_labels == 2 and again.decode_head.classifier.weight.shape[0] == 2
    assert torch.equal(again.decode_head.fpn_bottleneck.conv.weight, model.decode_head.fpn_bottleneck.conv.weight)
    assert all(parameter.requires_grad for parameter in again.parameters())
    state = classifier.state_dict()
    del state["vitae.stages.0.normal_cells.0.mlp.fc1.weight"]
    classifier.save_pretrained(tmp_path / "classifier", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights of ViTAEBackbone: \['vitae.stages.0.normal_cells.0.mlp.fc1"):
        load_segmenter(tmp_path / "classifier", NAMES, 16)


def test_a_segmenter_begins_with_a_masked_autoencoder(tmp_path):
    ViTAEForPreTraining(class_token_config(conv_kernel_size=1)).save_pretrained(tmp_path)
    model = load_segmenter(tmp_path, NAMES, 16)
    assert model.backbone.vitae.stages[0].normal_cells[0].conv_branch[0].conv.kernel_size == (3, 3)
    model.save_pretrained(tmp_path / "segmenter")
    assert_reloads(model, tmp_path / "segmenter", images())


def test_a_segmenter_goes_on_with_the_maps_it_had(tmp_path):
    config = dense_config(windowed_config(), out_features=["stage2", "stage3"])
    new_segmenter(config, NAMES, 16).save_pretrained(tmp_path)
    model = load_segmenter(tmp_path, NAMES)
    assert model.backbone.out_features == ["stage2", "stage3"] and len(model.decode_head.lateral_convs) == 1
    with pytest.raises(ValueError, match="or has them of other sizes: .*decode_head"):
        load_segmenter(tmp_path, NAMES, out_features=["stage1", "stage3"])


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


# ----------------------------------------------------------------------------------------------------------- the script


def options(output, **values) -> list[str]:
    common = {"dataset": SCENES, "short_side": 96, "crop_size": 96, "report_to": "none", "save_strategy": "no"}
    common |= {"head_channels": 16, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 20}
    values = {**common, "output_dir": output, **values}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """Four of the shipped scenes as both splits of a data set."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = datasets.load_dataset(str(SCENES), split="validation").select(range(4))
    for split in ("train", "validation"):
        scenes.to_parquet(folder / f"{split}-0.parquet")
    return folder


def test_the_script_learns_saves_draws_and_its_folder_segments(few_scenes, tmp_path):
    """It learns four scenes by heart; what it makes of new ones takes minutes, see the slow test."""
    learning = {"learning_rate": 1e-2, "warmup_steps": 5, "min_scale": 1, "max_scale": 1, "distortion_prob": 0}
    learning |= {"max_steps": 80, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    learning |= {"short_side": 64, "crop_size": 64}
    done = run("segment", *options(tmp_path, preset="vitae-nano", dataset=few_scenes, **learning))
    record = last_line(done)
    assert record["mean_iou_percent"] > 3 * record["constant_mean_iou_percent"]
    figures = json.loads((tmp_path / "segmentation_metrics.json").read_text())
    assert record["mean_iou_percent"] == round(figures["mean_iou"], 2) and len(figures["iou"]) == 11
    assert {"overlays.png", "training_curves.png", "eval_results.json"} <= {path.name for path in tmp_path.iterdir()}
    assert PIL.Image.open(tmp_path / "overlays.png").size > (1000, 600)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == round(figures["mean_iou"], 3)
    assert "| Ankle boot |" in card.text and "4 pictures" in card.text

    picture = PIL.Image.open(ASSETS / "chelsea.png").resize((131, 77))
    found = pipeline("image-segmentation", model=str(tmp_path))(picture)
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    classes = segment(model, AutoImageProcessor.from_pretrained(tmp_path), picture)
    for entry in found:
        assert np.array_equal(np.array(entry["mask"]) > 0, classes == model.config.label2id[entry["label"]])
    assert sum((np.array(entry["mask"]) > 0).sum() for entry in found) == 131 * 77


@pytest.mark.slow
def test_a_sixth_of_the_segmentation_demo_tells_garments_apart(tmp_path):
    """Twice as well as calling everything background, which is what far fewer updates come to."""
    config = RECIPES / "upernet-garment-scenes.yaml"
    record = last_line(run("segment", *options(tmp_path, config=config, head_channels=64, max_steps=500)))
    assert record["mean_iou_percent"] > 2 * record["constant_mean_iou_percent"]


def test_the_script_resumes_exactly_and_averages_weights(few_scenes, tmp_path):
    common = {"preset": "vitae-nano", "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "crop_size": 32}
    common |= {"ema_decay": 0.5, "overlays": 1, "drop_path_rate": 0.1, "dataset": few_scenes}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "short_side": 48}
    record = segment_command.main(options(tmp_path, **common))
    whole = UperNetForSemanticSegmentation.from_pretrained(record["model"]).state_dict()
    assert (tmp_path / "ema" / "overlays.png").exists()
    with pytest.raises(ValueError, match="checkpoint-4 is of an earlier run"):
        segment_command.main(options(tmp_path, **common))
    resumed = segment_command.main(options(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **common))
    weights = UperNetForSemanticSegmentation.from_pretrained(resumed["model"]).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())


@pytest.mark.parametrize("path", sorted((RECIPES).glob("upernet-*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_made_of_arguments_and_say_what_to_expect(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    given = [] if "preset" in recipe else ["--dataset", "x", "--model_name_or_path", "y"]
    parsed = segment_command.Segmentation.parse(["--config", str(path), "--output_dir", str(tmp_path), *given])
    values = {name: value for part in vars(parsed).values() for name, value in vars(part).items()}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy", "lr_scheduler_type", "report_to"}  # enumerations, a list


def test_a_model_to_begin_with_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="either --preset, to train from scratch, or --model_name_or_path"):
        segment_command.Segmentation.parse(["--dataset", "x", "--output_dir", str(tmp_path)])


def test_publishing_is_refused_before_anything_is_read(tmp_path):
    words = ["--dataset", "x", "--preset", "vitae-nano", "--output_dir", str(tmp_path), "--push_to_hub"]
    with pytest.raises(ValueError, match="--push_to_hub is for classifiers; publish a segmenter by its `push_to_hub`"):
        segment_command.main(words)


def test_overlays_tell_many_classes_apart_and_show_what_is_ignored():
    colours = class_colours(150)
    assert len(np.unique(colours.round(6), axis=0)) == 150 and np.ptp(colours, axis=1).min() > 0.01
    mask = np.full((20, 30), 255, np.uint8)
    mask[:10] = 3
    figure = draw_overlays(
        [(PIL.Image.new("RGB", (30, 20), "white"), mask, np.zeros_like(mask))], ["background", *"abcd"], ""
    )
    truth, prediction = (axis.images[0].get_array() for axis in figure.axes[1:3])
    assert np.allclose(truth[15], 0.35) and np.allclose(prediction, 1)  # ignored is dark, the background as it is
    assert np.allclose(truth[5, 0], 0.35 + 0.65 * class_colours(5)[3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["c"]
