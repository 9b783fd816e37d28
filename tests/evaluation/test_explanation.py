# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Explanations against plain references, and a model that stays as it was."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import measure_explanations
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import ASSETS, any_size, class_token_config, drawn, pyramid_config, run, vivid, windowed_config
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

from vitae_hf import ViTAEImageProcessor, ViTAEModel, prepare_for_inference
from vitae_hf.commands import explain as explain_command
from vitae_hf.evaluation.explanation import draw, explain
from vitae_hf.evaluation.scores import all_figures, draw_confusion, draw_per_class
from vitae_hf.files import PICTURES


PROCESSOR = ViTAEImageProcessor(size={"height": 64, "width": 96}, crop_pct=0.9)
CAT = PIL.Image.open(ASSETS / "chelsea.png")


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """The model with attention that prefers some tokens, BatchNorms that do something, and no trained weights."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight, gain=2)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def model(tiny_config):
    return lively(AutoModelForImageClassification.from_config(tiny_config()))


@pytest.fixture
def pixel_values():
    return PROCESSOR(CAT, return_tensors="pt").pixel_values


def dense_matrix(weights: torch.Tensor, height: int, width: int, window_size: int | None, padding: str) -> np.ndarray:
    """Mean over heads of eager weights, windows written out as one matrix over the grid, rows adding up to 1."""
    weights = weights.mean(1).double().numpy()
    if window_size is None:
        return weights[0]
    rows, columns = -(-height // window_size), -(-width // window_size)
    top, left = (rows * window_size - height) // 2, (columns * window_size - width) // 2
    top, left = (top, left) if padding == "both" else (0, 0)
    matrix = np.zeros((height * width, height * width))
    for window, block in enumerate(weights):
        places = {}
        for place in range(window_size**2):
            row = window // columns * window_size + place // window_size - top
            column = window % columns * window_size + place % window_size - left
            if 0 <= row < height and 0 <= column < width:
                places[place] = row * width + column
        inside, outside = list(places), list(places.values())
        matrix[np.ix_(outside, outside)] = block[np.ix_(inside, inside)]
    return matrix / matrix.sum(1, keepdims=True)


def where_it_looks(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Of a matrix over the grid, or over a class token and the grid."""
    first = len(matrix) - height * width
    looks = matrix[first:, first:].mean(0).reshape(height, width)
    return looks / looks.sum()


@torch.no_grad()
def dense_matrices(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, tuple[np.ndarray, int, int]]:
    """By name of the cell, from the weights that the model itself returns; none where windows are rotated."""
    model.set_attn_implementation("eager")
    weights = iter(model(pixel_values, output_attentions=True, **any_size(model)).attentions)
    model.set_attn_implementation("sdpa")
    config, matrices = model.config, {}
    height, width = pixel_values.shape[-2:]
    for stage, stride in enumerate(config.strides):
        height, width = height // stride, width // stride
        windows = getattr(config, "window_sizes", [None] * len(config.strides))[stage]
        names = ["reduction"] if hasattr(config, "window_sizes") else []
        for name in names + [f"cell {number + 1}" for number in range(config.depths[stage])]:
            padding, cell = getattr(config, "window_padding", None), next(weights)
            if len(cell) > 1 and windows is None:
                assert config.window_type != "plain"
                continue
            matrix = dense_matrix(cell, height, width, windows, padding)
            matrices[f"stage {stage + 1}, {name}"] = (matrix, height, width)
    assert next(weights, None) is None
    return matrices


def assert_maps_are_those_of_the_eager_weights(model: nn.Module, pixel_values: torch.Tensor):
    explanation, matrices = explain(model, PROCESSOR, CAT), dense_matrices(model, pixel_values)
    for name, looks in zip(explanation.cells, explanation.attention):
        if name not in matrices:
            is_rotated = getattr(model.config, "window_type", "plain") != "plain"
            assert looks is None and ("reduction" in name or is_rotated)  # random features, or keys between tokens
            continue
        np.testing.assert_allclose(looks, where_it_looks(*matrices.pop(name)), rtol=1e-4)
        assert looks.std() > 0.02 * looks.mean() and looks.sum() == pytest.approx(1)
    assert not matrices


def test_attention_maps_are_those_of_the_eager_weights(model, pixel_values):
    assert_maps_are_those_of_the_eager_weights(model, pixel_values)


def test_attention_maps_are_right_where_windows_are_padded_at_the_end(pixel_values):
    model = AutoModelForImageClassification.from_config(windowed_config(window_padding="end"))
    assert_maps_are_those_of_the_eager_weights(lively(model), pixel_values)


def test_rollout_is_the_dense_product_over_a_stage(model, pixel_values):
    products = {}
    for name, (matrix, height, width) in dense_matrices(model, pixel_values).items():
        stage, step = int(re.match(r"stage (\d+),", name)[1]), (matrix + np.eye(len(matrix))) / 2
        products[stage] = (step @ products[stage][0] if stage in products else step, height, width)
    if getattr(model.config, "window_type", "plain") != "plain":
        products = {}  # there is no product over a stage with cells whose keys lie between tokens
    rollout = explain(model, PROCESSOR, CAT).rollout
    assert list(rollout) == list(products)
    for stage, product in products.items():
        np.testing.assert_allclose(rollout[stage], where_it_looks(*product), rtol=1e-4)


@torch.no_grad()
def test_shares_are_those_of_the_two_branches_and_sum_to_one(model, pixel_values):
    inputs, cells = {}, {}
    for stage_number, stage in enumerate(model.base_model.stages, start=1):
        numbered = {f"cell {number}": cell for number, cell in enumerate(stage.normal_cells, start=1)}
        reduction = {} if model.config.is_plain else {"reduction": stage.reduction_cell}
        for name, cell in {**reduction, **numbered}.items():
            if hasattr(cell, "conv_branch"):
                name = f"stage {stage_number}, {name}"
                cells[name] = cell
                cell.register_forward_hook(lambda _, args, output, name=name: inputs.update({name: args}))
    model(pixel_values, **any_size(model))
    explanation = explain(model, PROCESSOR, CAT)
    assert explanation.cells == list(cells)
    assert [f"stage {stage}" for stage in explanation.stages] == [name.split(",")[0] for name in cells]
    for name, share, rest in zip(cells, explanation.attention_share, explanation.convolution_share):
        cell, (states, *grid), (height, width) = cells[name], inputs[name], share.shape
        first = int(model.config.has_class_token)
        if grid:
            assert tuple(grid) == share.shape
            feature_map, tokens = states[:, first:].mT.reshape(1, -1, height, width), states
        else:
            feature_map, tokens = states, cell.pyramid_reduction(states)
        attention = cell.attention(cell.layernorm_before(tokens), height, width)[0][0, first:].square().sum(-1).sqrt()
        convolution = cell.conv_branch(feature_map)[0].flatten(1).square().sum(0).sqrt()
        expected = (attention / (attention + convolution)).view(height, width)
        np.testing.assert_allclose(share, expected, rtol=1e-4)
        np.testing.assert_allclose(share + rest, 1, rtol=1e-6)
        assert share.std() > 1e-3


def plain_grad_cam(model: nn.Module, pixel_values: torch.Tensor, target: int) -> np.ndarray:
    """Straight from the definition, with a graph of the whole network."""
    kept = []
    handle = model.base_model.stages[-1].normal_cells[-1].register_forward_hook(lambda *args: kept.append(args[2]))
    logits = model(pixel_values, **any_size(model)).logits
    handle.remove()
    gradient = torch.autograd.grad(logits[0, target], kept)[0]
    first, (height, width) = int(model.config.has_class_token), (side // 16 for side in pixel_values.shape[-2:])
    weight, tokens = gradient[0, first:].mean(0), kept[0][0, first:]
    heat = (tokens @ weight).relu().view(1, 1, height, width)
    heat = nn.functional.interpolate(heat, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    heat = (heat - heat.min()) / (heat - heat.min()).max().clamp_min(1e-7)  # zero if nothing speaks for the target
    return heat.detach().numpy()


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_grad_cam_is_what_autograd_gives(model, pixel_values, context):
    expected = [plain_grad_cam(model, pixel_values, target) for target in range(5)]
    with context():
        explained = [explain(model, PROCESSOR, CAT, target).grad_cam for target in range(5)]
    np.testing.assert_allclose(explained, expected, atol=1e-4)
    assert explained[0].shape == (64, 96) and np.ptp(explained) > 0.9
    best = explain(model, PROCESSOR, CAT)
    np.testing.assert_array_equal(best.grad_cam, explained[best.target])


def test_image_and_labels_are_those_of_the_pipeline(model, pixel_values):
    explanation = explain(model, PROCESSOR, CAT)
    seen = PROCESSOR(CAT, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    np.testing.assert_array_equal(explanation.image, seen.transpose(1, 2, 0))
    scores = model(pixel_values, **any_size(model)).logits[0].softmax(-1)
    order = scores.argsort(descending=True).tolist()
    assert [entry["label"] for entry in explanation.labels] == [f"LABEL_{index}" for index in order]
    assert [entry["score"] for entry in explanation.labels] == pytest.approx(scores[order].tolist(), rel=1e-4)
    assert explanation.target == order[0] and explain(model, PROCESSOR, CAT, "LABEL_2").target == 2
    model.config.problem_type = "multi_label_classification"
    assert sum(entry["score"] for entry in explain(model, PROCESSOR, CAT).labels) > 1.01


@pytest.mark.parametrize("channels", [1, 13])
def test_pictures_of_other_channels_are_drawn_as_their_mean(channels, tmp_path):
    model = lively(AutoModelForImageClassification.from_config(windowed_config(num_channels=channels)))
    mean, std = [0.5] * channels, [0.25] * channels
    options = {
        "do_resize": False,
        "do_convert_rgb": False,
        "input_data_format": "channels_last",
    }
    processor = ViTAEImageProcessor(size=64, image_mean=mean, image_std=std, **options)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, channels), np.uint8)
    explanation = explain(model, processor, picture)
    means = picture.mean(-1, keepdims=True).round()
    assert explanation.image.shape == (64, 64, 3) and np.abs(explanation.image - means).max() <= 1
    draw(explanation).savefig(tmp_path / "picture.png")
    assert vivid(tmp_path / "picture.png") > 1000


def test_names_with_dollars_are_drawn_as_they_are(model, tmp_path):
    model.config.id2label = dict.fromkeys(model.config.id2label, "a_$x^$")
    draw(explain(model, PROCESSOR, CAT)).savefig(tmp_path / "picture.png")
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).numpy()
    figures = all_figures(scores, np.arange(2), ["a_$x^$", "$b^$"])
    for number, figure in enumerate((draw_confusion(figures), draw_per_class(figures))):
        figure.savefig(tmp_path / f"{number}.png")  # matplotlib would read a formula, and fail


def test_values_without_bounds_are_drawn_from_black_to_white():
    model = lively(AutoModelForImageClassification.from_config(windowed_config(num_channels=13)))
    options = {"do_resize": False, "do_convert_rgb": False, "do_rescale": False, "input_data_format": "channels_last"}
    processor = ViTAEImageProcessor(size=64, image_mean=[1000.0] * 13, image_std=[400.0] * 13, **options)
    picture = np.random.default_rng(0).uniform(200, 3000, (64, 64, 1)).repeat(13, -1).astype(np.float32)
    expected = 255 * (picture[..., :1] - picture.min()) / (picture.max() - picture.min())
    assert np.abs(explain(model, processor, picture).image - expected).max() <= 1


def test_the_scores_of_a_regression_are_the_numbers_that_it_predicts(tmp_path):
    config = pyramid_config(problem_type="regression", num_labels=1, id2label=None)
    model = lively(AutoModelForImageClassification.from_config(config)).eval()
    classify = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    (expected,) = classify(CAT)
    (found,) = explain(model, PROCESSOR, CAT).labels
    assert found["score"] == pytest.approx(expected["score"], abs=1e-4) and not 0 <= found["score"] <= 1


def test_a_picture_is_not_written_over_by_what_explains_it(tmp_path):
    shutil.copy(ASSETS / "sneaker.png", tmp_path)
    before = (tmp_path / "sneaker.png").read_bytes()
    with pytest.raises(ValueError, match="sneaker.png would be written over by what explains it: choose another"):
        explain_command.main(["vitae-nano-fashion", str(tmp_path / "sneaker.png"), "--output", str(tmp_path)])
    assert (tmp_path / "sneaker.png").read_bytes() == before


def test_pictures_to_write_have_names_of_their_own():
    paths = explain_command.picture_paths(["a/cat-2.jpg", "cat.jpg", "b/Cat.png", "dog.png"], Path("out"))
    assert [path.name for path in paths] == ["cat-2.png", "cat.png", "Cat-3.png", "dog.png"]


def test_classes_of_one_name_are_told_apart(model):
    model.config.id2label = {4: "eel", 1: "crane", 0: "crane", 2: "cat", 3: "dog"}  # in the order of the file
    labels = [entry["label"] for entry in explain(model, PROCESSOR, CAT).labels]
    assert set(labels) == {"crane", "crane2", "cat", "dog", "eel"}
    assert explain(model, PROCESSOR, CAT, "crane2").target == 1


def state(model: nn.Module) -> tuple:
    modules, parameters = list(model.modules()), list(model.parameters())
    return (
        [module.training for module in modules],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [parameter.requires_grad for parameter in parameters],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        model.config.to_dict(),
        model.config._attn_implementation,
    )


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.base_model.stages[0].eval().requires_grad_(False)
    for parameter in model.classifier.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(model)
    explain(model, PROCESSOR, CAT)
    assert state(model) == before
    model.classifier.bias.data[0] = torch.inf
    before = state(model)
    with pytest.raises(ValueError, match="not finite"):
        explain(model, PROCESSOR, CAT)
    assert state(model) == before


def test_a_prepared_model_in_half_precision_shows_the_same(model):
    whole = explain(model, PROCESSOR, CAT)
    half = explain(prepare_for_inference(model, torch.bfloat16), PROCESSOR, CAT, whole.target)
    for name in ("grad_cam", "attention_share"):
        for expected, got in zip(getattr(whole, name), getattr(half, name)):
            np.testing.assert_allclose(got, expected, atol=0.1)
    for stage, rollout in whole.rollout.items():
        np.testing.assert_allclose(half.rollout[stage], rollout, atol=0.1 * rollout.max())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_explained_and_not_compiled_again(pixel_values, in_place):
    model, compilations = lively(AutoModelForImageClassification.from_config(pyramid_config())), []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    expected = explain(model, PROCESSOR, CAT)
    if in_place:
        model.compile(backend=count)
    compiled = model if in_place else torch.compile(model, backend=count)
    with torch.no_grad():
        compiled(pixel_values)
        before = len(compilations)
        explained = explain(compiled, PROCESSOR, CAT)
        compiled(pixel_values)
    assert len(compilations) == before > 0
    np.testing.assert_allclose(explained.attention[-1], expected.attention[-1], rtol=1e-4)
    np.testing.assert_allclose(explained.grad_cam, expected.grad_cam, atol=1e-4)


def test_what_cannot_be_explained_is_told():
    model = AutoModelForImageClassification.from_config(pyramid_config(num_labels=2, id2label={0: "cat", 1: "dog"}))
    with pytest.raises(ValueError, match="no class 'cow'; of its 2 these are closest: dog, cat"):
        explain(model, PROCESSOR, CAT, "cow")
    with pytest.raises(ValueError, match="from 0 to 1, or a label; got 2"):
        explain(model, PROCESSOR, CAT, 2)
    with pytest.raises(ValueError, match="one image, got 2"):
        explain(model, PROCESSOR, [CAT, CAT])
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for other in (ViTAEModel(pyramid_config()), ViTForImageClassification(ViTConfig(**tiny))):
        with pytest.raises(ValueError, match=f"classifier of the ViTAE family, got {type(other).__name__}"):
            explain(other, PROCESSOR, CAT)


def test_the_picture_has_all_maps(model, tmp_path):
    explanation = explain(model, PROCESSOR, CAT)
    figure = draw(explanation)
    figure.savefig(tmp_path / "picture.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count(f"Grad-CAM: {explanation.target_label}") == 1
    for name in explanation.cells:
        assert titles.count(name) == 1 or len(explanation.cells) > 6
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    without_matrix = sum(looks is None for looks in explanation.attention)
    assert sum("no matrix" in text for text in texts) == without_matrix
    for entry in explanation.labels:
        assert f"{entry['label']} {entry['score']:.1%}" in texts


def test_the_script_draws_each_image_and_names_a_broken_one(tmp_path):
    model = lively(AutoModelForImageClassification.from_config(windowed_config()))
    for saved in (model, ViTAEImageProcessor(size=64)):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    sources = [ASSETS / name for name in ("chelsea.png", "sneaker.png", "chelsea.png")]
    sources.insert(1, tmp_path / "broken.png")
    sources += [tmp_path / "missing.png", tmp_path, "http://127.0.0.1:9/picture.png"]
    arguments = [tmp_path / "model", *sources, "--output", tmp_path / "out", "--target", "LABEL_3"]
    done = run("explain", *arguments, "--image_size", 64, 96)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    broken, missing, folder, elsewhere = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert "broken.png" in broken and missing == f"error: {tmp_path / 'missing.png'}: there is no such file"
    assert folder == f"error: {tmp_path}: it is a folder: name the pictures in it"
    assert elsewhere.startswith("error: http://127.0.0.1:9/picture.png: no picture came from there: ")
    *lines, record = map(json.loads, done.stdout.splitlines())
    assert record["images"] == len(lines) == 3 and record["failed"] == [str(sources[i]) for i in (1, 4, 5, 6)]
    expected = explain(model, PROCESSOR, CAT)
    assert lines[0]["labels"] == [
        {**entry, "score": pytest.approx(entry["score"], abs=1e-4)} for entry in expected.labels
    ]
    assert lines[0]["target"] == "LABEL_3" and list(lines[0]["attention_percent"]) == expected.cells
    names = ["chelsea.png", "sneaker.png", "chelsea-2.png"]
    assert [line["picture"] for line in lines] == [str(tmp_path / "out" / name) for name in names]
    assert all(len(drawn(line["picture"])[1]) > 1000 for line in lines) and vivid(lines[1]["picture"]) > 1000


def test_without_images_the_pictures_of_the_package_are_explained(tmp_path, capsys):
    lively(AutoModelForImageClassification.from_config(class_token_config())).save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    record = explain_command.main([str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert record["images"] == 2 and [line["image"] for line in lines] == list(map(str, PICTURES))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"chelsea.png", "sneaker.png"}
    with pytest.raises(SystemExit):
        explain_command.main(["--help"])
    assert "default: chelsea.png and sneaker.png of the package" in " ".join(capsys.readouterr().out.split())


def test_the_script_refuses_an_unknown_target_at_once(tmp_path):
    lively(AutoModelForImageClassification.from_config(class_token_config())).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has no class 'cow'"):
        explain_command.main([str(tmp_path), str(ASSETS / "sneaker.png"), "--target", "cow"])


def test_maps_are_measured_on_the_garment(tmp_path):
    garment = np.zeros((4, 4), bool)
    garment[:2, 2:] = True
    assert measure_explanations.on_garment(np.array([[1.0, 5], [0, 2]]), garment) == (2.5, True)
    assert measure_explanations.on_garment(np.array([[3.0, 1], [0, 0]]), garment) == (1.0, False)
    names = {index: str(index) for index in range(10)}
    lively(AutoModelForImageClassification.from_config(windowed_config(num_labels=10, id2label=names))).save_pretrained(
        tmp_path
    )
    ViTAEImageProcessor(size=64, crop_pct=1.0).save_pretrained(tmp_path)
    record = measure_explanations.main([str(tmp_path), "--output", str(tmp_path / "out"), "--images", "3"])
    assert record["images"] == 3 and 10 < record["garment_percent"] < 90
    assert len(record["maps"]) == 1 + 3 + 7 + 7  # Grad-CAM, stages, attention and share of cells
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert len(drawn(tmp_path / "out.png")[1]) > 1000
