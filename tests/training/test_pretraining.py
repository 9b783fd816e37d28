"""The masked autoencoder: its parts against plain references, what other classes make of its folder, and the script."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate import init_empty_weights
from datasets import Dataset, load_dataset
from helpers import DATA, LINES, as_words, class_token_config, drawn, images, pyramid_config
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from vitae_hf import ViTAEBackbone, ViTAEForImageClassification, ViTAEForPreTraining, ViTAEModel, config_from_preset
from vitae_hf.commands import pretrain, train
from vitae_hf.commands.pretrain import Pretraining
from vitae_hf.data.samples import collate
from vitae_hf.data.shards import StreamedImageDataset, find_shards
from vitae_hf.data.sources import load_images
from vitae_hf.decoder_vitae import ViTAEDecoder, patchify, unpatchify
from vitae_hf.embeddings_vitae import sin_cos_positions
from vitae_hf.files import RECIPES
from vitae_hf.training.optimization import parameter_groups
from vitae_hf.training.reconstruction import reconstruct


DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}


def autoencoder(**overrides) -> ViTAEForPreTraining:
    """A tiny one in eval mode, whose BatchNorms have seen data."""
    model = ViTAEForPreTraining(class_token_config(conv_kernel_size=1, **{**DECODER, **overrides}))
    with torch.no_grad():
        height, width = model.config.image_height_width
        model.train()(images(4, height, width))
    return model.eval()


# ------------------------------------------------------------------------------------------------ the network


def positions_by_formula(rows: int, columns: int, channels: int) -> torch.Tensor:
    """Row by row, entry by entry: a quarter each of sin(column), cos(column), sin(row), cos(row)."""
    quarter, table = channels // 4, []
    for row in range(rows):
        for column in range(columns):
            angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
            table.append([f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis])
    return torch.tensor(table, dtype=torch.float64)


def test_positions_are_the_sines_and_cosines_of_column_and_row():
    table = sin_cos_positions((3, 5), 24)
    assert table.shape == (1, 16, 24) and not table[0, 0].any()
    assert torch.allclose(table[0, 1:].double(), positions_by_formula(3, 5, 24), atol=1e-6)
    model = autoencoder(image_size=(48, 80))
    assert torch.equal(model.vitae.embeddings.position_embeddings, sin_cos_positions((3, 5), 32))
    assert torch.equal(model.decoder.position_embeddings, sin_cos_positions((3, 5), 16))
    assert model.vitae.embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def encode_one_image(weights: dict[str, torch.Tensor], config, image: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The encoder's tokens for some patches of one image, token by token: shares only weights with the network."""

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def layer_norm(name, x):
        normalised = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
        return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def grouped(name, x):
        weight = weights[f"{name}.weight"][:, :, 0, 0]
        parts = zip(weight.chunk(config.conv_groups[0]), x.chunk(config.conv_groups[0]))
        return torch.cat([rows @ part for rows, part in parts]) + weights[f"{name}.bias"]

    def branch(name, x):
        x, norm = grouped(f"{name}.0.conv", x), f"{name}.0.norm"
        x = (x - weights[f"{norm}.running_mean"]) / (weights[f"{norm}.running_var"] + 1e-5).sqrt()
        x = x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        return grouped(f"{name}.1.conv", x * torch.sigmoid(x))

    def mlp(name, x):
        x = linear(f"{name}.fc1", x)
        return linear(f"{name}.fc2", x * (1 + torch.erf(x / math.sqrt(2))) / 2)

    side, columns = config.total_stride, image.shape[-1] // config.total_stride
    positions = positions_by_formula(image.shape[-2] // side, columns, config.hidden_size)
    projection = weights["embeddings.projection.weight"].flatten(1)
    tokens = [weights["embeddings.cls_token"][0, 0]]
    for index in ids:
        top, left = index // columns * side, index % columns * side
        pixels = image[:, top : top + side, left : left + side].flatten()
        tokens.append(projection @ pixels + weights["embeddings.projection.bias"] + positions[index])
    heads, width = config.num_attention_heads[0], config.hidden_size // config.num_attention_heads[0]
    for cell in range(config.depths[0]):
        name = f"stages.0.normal_cells.{cell}"
        normed = [layer_norm(f"{name}.layernorm_before", x) for x in tokens]
        projected = {kind: [linear(f"{name}.attention.{kind}_proj", x) for x in normed] for kind in "qkv"}
        attended = [torch.empty_like(x) for x in tokens]
        for place, query in enumerate(projected["q"]):
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([query[part] @ key[part] / math.sqrt(width) for key in projected["k"]])
                shares = scores.exp() / scores.exp().sum()
                attended[place][part] = sum(share * value[part] for share, value in zip(shares, projected["v"]))
        after = [x + linear(f"{name}.attention.o_proj", y) for x, y in zip(tokens, attended)]
        after[1:] = [y + branch(f"{name}.conv_branch", x) for x, y in zip(tokens[1:], after[1:])]
        tokens = [x + mlp(f"{name}.mlp", layer_norm(f"{name}.layernorm_after", x)) for x in after]
    return torch.stack(tokens)


def test_visible_patches_are_encoded_as_a_plain_loop_encodes_them():
    """A mask that leaves 7 of 24 patches, which is no square and no part of the grid's rows."""
    model = autoencoder(image_size=(64, 96), mask_ratio=0.7).double()
    pixel_values, noise = images(2, 64, 96).double(), torch.rand(2, 24)
    encoded = []
    model.vitae.register_forward_hook(lambda module, inputs, output: encoded.append(output.last_hidden_state))
    outputs = model(pixel_values, noise=noise)
    assert (outputs.mask == 0).sum(1).tolist() == [7, 7] and outputs.logits.shape == (2, 24, 16 * 16 * 3)
    for index in range(2):
        visible = noise[index].argsort()[:7].tolist()
        assert sorted(visible) == torch.nonzero(outputs.mask[index] == 0).flatten().tolist()
        expected = encode_one_image(model.vitae.state_dict(), model.config, pixel_values[index], visible)
        # positions of the model are rounded to float32
        assert (encoded[0][index] - expected).abs().max() < 1e-5 * expected.std()


def test_patches_hold_their_pixels_row_by_row_with_channels_innermost():
    pixel_values = images(2, 32, 48)
    patches = patchify(pixel_values, 16)
    assert torch.equal(patches[1, 4].view(16, 16, 3), pixel_values[1, :, 16:32, 16:32].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 16, (2, 3)), pixel_values)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_that_of_masked_patches_alone(norm_pix_loss):
    model = autoencoder(norm_pix_loss=norm_pix_loss)
    pixel_values, noise = images(2), torch.rand(2, 16)
    outputs = model(pixel_values, noise=noise)
    errors = []
    for image, logits, mask in zip(pixel_values, outputs.logits, outputs.mask):
        for index in torch.nonzero(mask).flatten().tolist():
            top, left = index // 4 * 16, index % 4 * 16
            target = image[:, top : top + 16, left : left + 16].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            errors.append(((logits[index] - target) ** 2).mean())
    assert len(errors) == 24 and torch.allclose(outputs.loss, torch.stack(errors).mean(), rtol=1e-5)
    # what is hidden reaches the loss as a target, and the predictions not at all
    pixel_values = pixel_values + unpatchify(outputs.mask[..., None].expand(-1, -1, 768) * torch.rand(768), 16, (4, 4))
    hidden_changed = model(pixel_values, noise=noise)
    assert torch.equal(hidden_changed.logits, outputs.logits) and not torch.equal(hidden_changed.loss, outputs.loss)


def test_masks_are_random_and_every_patch_gets_its_own_prediction():
    model = autoencoder()
    masks = torch.cat([model(images(4)).mask for _ in range(25)])
    assert masks.unique(dim=0).shape[0] > 90 and (masks.sum(1) == 12).all()
    assert (masks.mean(0) - 0.75).abs().max() < 0.2
    noise = torch.rand(2, 16)
    model.decoder.prediction = torch.nn.Identity()
    before = model.decoder.layers[0].register_forward_pre_hook
    seen = []
    before(lambda module, inputs: seen.append(inputs[0]))
    outputs = model.vitae(images(2), ids_keep=noise.argsort(1)[:, :4]).last_hidden_state
    model.decoder(outputs, noise.argsort(1).argsort(1), 4, 4)
    tokens = seen[0][:, 1:] - model.decoder.position_embeddings[:, 1:]
    embedded = model.decoder.embedding(outputs)[:, 1:]
    for image, order in enumerate(noise.argsort(1)):
        assert torch.allclose(tokens[image, order[:4]], embedded[image], atol=1e-5)
        assert torch.allclose(tokens[image, order[4:]], model.decoder.mask_token[0].expand(12, -1), atol=1e-5)


def test_outputs_are_the_encoders_and_take_any_backend():
    model = autoencoder(attn_implementation="eager")
    noise = torch.rand(2, 16)
    outputs = model(images(2), noise=noise, output_hidden_states=True, output_attentions=True)
    assert [tuple(tokens.shape) for tokens in outputs.hidden_states] == [(2, 5, 32)] * 2
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 5, 5)] * 2
    model.set_attn_implementation("sdpa")
    assert torch.allclose(model(images(2), noise=noise).logits, outputs.logits, atol=1e-5)


def test_training_reaches_every_parameter_but_the_positions_under_checkpointing_and_bfloat16():
    model = autoencoder().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(2)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == ["vitae.embeddings.position_embeddings"]
    groups = parameter_groups(model, 1.0, 0.05)
    names = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert names["decoder.mask_token"] == names["vitae.embeddings.cls_token"] == 0 and untouched[0] not in names


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="presets vitae-b, .*vitae-nano-mae"):
        ViTAEForPreTraining(pyramid_config(conv_kernel_size=1))
    with pytest.raises(ValueError, match="set `conv_kernel_size=1`"):
        ViTAEForPreTraining(class_token_config())
    model = autoencoder()
    with pytest.raises(ValueError, match=r"`noise` must be .* \(2, 16\); got \(2, 4\)"):
        model(images(2), noise=torch.rand(2, 4))
    for ratio, visible in ((0.99, 0), (1e-9, 16)):
        model.config.mask_ratio = ratio
        with pytest.raises(ValueError, match=f"leaves {visible} of 16 patches visible"):
            model(images(2))
    with pytest.raises(ValueError, match="keeps its 1×1 kernels"):
        model.expand_conv_kernels()
    with pytest.raises(ValueError, match="`ids_keep` takes a class token and `conv_kernel_size=1`"):
        ViTAEModel(class_token_config())(images(2), ids_keep=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Input image size \(64\*96\) doesn't match"):
        autoencoder()(images(2, 64, 96))
    for field, value in (("mask_ratio", 1.0), ("decoder_hidden_size", 18), ("decoder_num_attention_heads", 3)):
        with pytest.raises(ValueError, match=f"`{field}` must"):
            class_token_config(**{**DECODER, field: value})


# ------------------------------------------------------------------------------------------------- folders


def test_the_decoder_has_its_positions_before_weights_are_initialised():
    config = class_token_config(conv_kernel_size=1)
    initialised = ViTAEForPreTraining(config).decoder
    assert torch.equal(ViTAEDecoder(config).position_embeddings, initialised.position_embeddings)


def test_a_saved_autoencoder_reloads_with_its_fixed_positions(tmp_path):
    model, noise = autoencoder(), torch.rand(2, 16)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(reloaded, ViTAEForPreTraining) and reloaded.config.conv_kernel_size == 1
    assert torch.equal(reloaded(images(2), noise=noise).logits, model(images(2), noise=noise).logits)
    assert not reloaded.train().vitae.embeddings.position_embeddings.requires_grad


def test_another_size_resamples_the_positions_of_encoder_and_decoder_alike(tmp_path):
    model, noise, pixel_values = autoencoder(), torch.rand(2, 24), images(2, 64, 96)
    expected = model(pixel_values, noise=noise, interpolate_pos_encoding=True).logits
    model.resize_position_embeddings((64, 96))
    assert torch.equal(model(pixel_values, noise=noise).logits, expected)
    model.save_pretrained(tmp_path)
    assert not model.vitae.embeddings.position_embeddings.requires_grad
    assert torch.equal(ViTAEForPreTraining.from_pretrained(tmp_path)(pixel_values, noise=noise).logits, expected)


@torch.no_grad()
def test_other_classes_load_3x3_kernels_that_change_nothing_and_name_what_is_new(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    new = {f"vitae.pooler.layernorm.{name}" for name in ("weight", "bias")} | {"classifier.weight", "classifier.bias"}
    assert report["missing_keys"] == new and not report["unexpected_keys"] and not report["mismatched_keys"]
    narrow = ViTAEForImageClassification.from_pretrained(tmp_path, conv_kernel_size=1)
    narrow.classifier.load_state_dict(model.classifier.state_dict())
    assert (model.config.conv_kernel_size, narrow.config.conv_kernel_size) == (3, 1)
    shapes = {tuple(layer.conv.weight.shape[2:]) for layer in model.vitae.stages[0].normal_cells[1].conv_branch}
    assert shapes == {(3, 3)}
    for size in ((64, 64), (48, 96)):
        logits = [network(images(3, *size), interpolate_pos_encoding=True).logits for network in (model, narrow)]
        assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[1].std()
    model.save_pretrained(tmp_path / "expanded")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "expanded").eval()
    assert torch.equal(again(images(2)).logits, model(images(2)).logits)
    expected = narrow.vitae(images(2)).last_hidden_state
    for other in (
        AutoModel.from_pretrained(tmp_path),
        ViTAEModel.from_pretrained(tmp_path, conv_kernel_size=3, add_pooling_layer=False),
    ):
        assert torch.allclose(other(images(2)).last_hidden_state, expected, atol=1e-5)
    (feature_map,) = ViTAEBackbone.from_pretrained(tmp_path)(images(2)).feature_maps
    assert torch.allclose(feature_map.flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-5)


def test_a_configuration_with_3x3_kernels_loads_the_pretrained_ones_all_the_same(tmp_path):
    ViTAEForPreTraining(class_token_config(conv_kernel_size=1)).save_pretrained(tmp_path)
    expected = AutoModel.from_pretrained(tmp_path).state_dict()
    class_token_config().save_pretrained(tmp_path / "fine_tuned")
    state_dict = ViTAEForPreTraining.from_pretrained(tmp_path).state_dict()
    for source, given in (
        (tmp_path, {"config": class_token_config()}),
        (tmp_path, {"config": tmp_path / "fine_tuned"}),
        (tmp_path, {"conv_kernel_size": 3}),
        (None, {"config": class_token_config(), "state_dict": state_dict}),
        (None, {"config": tmp_path, "state_dict": state_dict}),
        (None, {"config": tmp_path / "fine_tuned", "state_dict": state_dict}),
    ):
        model = ViTAEModel.from_pretrained(source, **given)
        assert model.config.conv_kernel_size == 3
        found = model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items() if "conv_branch" in name)
    assert AutoModel.from_pretrained(tmp_path, conv_kernel_size=3).state_dict().keys() == expected.keys()


def test_expanded_kernels_begin_to_learn_from_neighbours():
    model = ViTAEForImageClassification(class_token_config(conv_kernel_size=1))
    model.expand_conv_kernels()
    model(images(4), labels=torch.arange(4)).loss.backward()
    gradient = model.vitae.stages[0].normal_cells[0].conv_branch[0].conv.weight.grad
    assert (gradient[:, :, 0, 0] != 0).any() and model.vitae.embeddings.position_embeddings.requires_grad


def test_offloaded_kernels_are_an_error_and_not_a_model_half_expanded():
    with init_empty_weights():
        model = ViTAEForImageClassification(class_token_config(conv_kernel_size=1))
    with pytest.raises(ValueError, match="load the model without `device_map`"):
        model.expand_conv_kernels()
    assert model.config.conv_kernel_size == 1


# ---------------------------------------------------------------------------------------------- the script


def options(**values) -> list[str]:
    common = {"dataloader_drop_last": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return as_words({**common, **values})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What the script leaves and its record, after 60 updates on a folder of 320 real images without classes."""
    root = tmp_path_factory.mktemp("mae")
    (root / "images").mkdir()
    rows = load_dataset("parquet", data_files=str(DATA / "train-*.parquet"), split="train[:320]")
    for index, row in enumerate(rows):
        row["image"].save(root / "images" / f"{index}.png")
    arguments = options(
        dataset=root / "images",
        preset="vitae-nano-mae",
        output_dir=root / "mae",
        eval_share=0.1,
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=30,
        eval_on_start=True,
        pictures=3,
        report_to="tensorboard",
    )
    return root, pretrain.main(arguments)


def test_the_loss_falls_on_real_images_without_labels(pretrained):
    root, record = pretrained
    history = json.loads((root / "mae" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] < 0.75 * losses[0]
    assert losses[-1] == pytest.approx(record["eval_loss"], abs=1e-4)
    assert record["eval_split"] == "held_out" and record["skipped"] == 0 and record["images_per_s"] > 0


@pytest.mark.parametrize("kind", [{"preset": "vitae-nano-mae"}, {"preset": "vitae-nano", "mask_patch_size": 16}])
def test_every_evaluation_hides_the_same_patches_and_leaves_the_random_state(pretrained, tmp_path, kind):
    root, _ = pretrained
    arguments = options(dataset=root / "images", output_dir=tmp_path, eval_share=0.1, **kind)
    trainer = Pretraining.parse(arguments).build_trainer()
    losses = []
    for seed in (1, 2):
        state = torch.manual_seed(seed).get_state()
        losses.append(trainer.evaluate()["eval_loss"])
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]


def test_pictures_curves_card_and_tensorboards_files_are_written(pretrained):
    root, record = pretrained
    pictures = sorted((root / "mae" / "reconstructions").iterdir())
    assert [path.stem for path in pictures] == ["step-000000", "step-000030", "step-000060"]
    assert record["picture"] == str(pictures[-1]) and pictures[0].read_bytes() != pictures[-1].read_bytes()
    size, colours = drawn(root / "mae" / "training_curves.png")
    assert size == (1040, 432) and set(LINES[:2]) <= colours  # two panels: losses, and the learning rate
    logged = b"".join(path.read_bytes() for path in (root / "mae" / "runs").rglob("events.out.*"))
    assert logged.count(b"reconstructions") >= 3 and logged.count(b"PNG") >= 3
    card = ModelCard.load(root / "mae" / "README.md")
    assert (root / "mae" / "reconstructions.png").read_bytes() == pictures[-1].read_bytes()
    assert "](reconstructions.png)" in card.text and f"{record['eval_loss']:.4f}" in card.text
    assert "masked-autoencoder" in card.data.tags and "288 images" in card.text and "the split" in card.text


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_picture_shows_visible_patches_as_they_are_and_predictions_in_the_images_own_scale(norm_pix_loss):
    model = autoencoder(norm_pix_loss=norm_pix_loss)
    pixel_values, noise = images(2), torch.rand(2, 16)
    blank, pasted = reconstruct(model, pixel_values, noise)
    outputs = model(pixel_values, noise=noise)
    is_masked = unpatchify(outputs.mask[..., None].expand(-1, -1, 768), 16, (4, 4)).bool()
    assert torch.equal(blank.isnan(), is_masked) and torch.equal(pasted[~is_masked], pixel_values[~is_masked])
    error = (patchify(pasted - pixel_values, 16) ** 2).mean(-1)
    if norm_pix_loss:
        error = error / (patchify(pixel_values, 16).var(-1) + 1e-6)
    assert torch.allclose((error * outputs.mask).sum() / 24, outputs.loss, rtol=1e-4)


def test_it_is_fine_tuned_by_the_training_script_with_layer_decay_at_another_size(pretrained, tmp_path):
    root, _ = pretrained
    for index in range(24):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((30, 30, 3), 10 * index, np.uint8)).save(path)
    common = {
        "dataset": tmp_path / "images",
        "eval_share": 0.25,
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "layer_decay": 0.5,
        "image_size": 96,
    }
    record = train.main(options(**common, model_name_or_path=root / "mae", output_dir=tmp_path / "out"))
    tuned = ViTAEForImageClassification.from_pretrained(tmp_path / "out")
    assert (tuned.config.conv_kernel_size, tuned.config.image_size, tuned.config.num_labels) == (3, 96, 2)
    assert record["eval_split"] == "held_out"
    kernel = tuned.vitae.stages[0].normal_cells[3].conv_branch[0].conv.weight
    assert kernel[:, :, 0, 0].any()  # the zeros around have learned


def test_data_without_their_labels_are_pictures_alone_in_memory_and_streamed(tmp_path):
    assert load_images(str(DATA), splits=["test"])["test"].column_names == ["image"]
    rows = load_dataset("parquet", data_files=str(DATA / "test-*.parquet"), split="train[:10]")
    Dataset.from_dict({"picture": rows["image"]}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    stream = StreamedImageDataset(
        find_shards(str(tmp_path), labelled=False), lambda picture: torch.tensor(picture.size), batch_size=5
    )
    samples = list(stream)
    assert len(samples) == 10 and set(collate(samples)) == {"pixel_values", "names"}


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--label_smoothing_factor=0.1", "there are no labels"),
        ("--pictures=0", "--pictures must be at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense_here_are_refused(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        Pretraining.parse(["--dataset", "x", "--preset", "vitae-nano-mae", "--output_dir", str(tmp_path), argument])


@pytest.mark.parametrize("name", ["mae-b", "mae-l", "mae-h", "mae-b-millionaid"])
def test_recipes_are_made_of_arguments_with_the_published_numbers(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert {"model", "hardware", "global_batch", "expected", "source"} == set(recipe["about"])
    common = ["--config", str(path), "--dataset", "imagenet", "--output_dir", str(tmp_path), "--report_to", "none"]
    task = Pretraining.parse(common)
    run, training = task.run, task.training
    values = {**vars(run), **vars(training)}
    different = {name for name, value in recipe.items() if name != "about" and values[name] != value}
    assert different <= {"eval_strategy", "save_strategy"} and run.preset == f"vitae-{name[4]}"
    assert run.norm_pix_loss == (name != "mae-b-millionaid")
    devices = 2048 // training.per_device_train_batch_size
    assert training.learning_rate * devices == pytest.approx(1.5e-4 * 2048 / 256)
    assert training.warmup_steps * training.num_train_epochs == pytest.approx(40)
    assert (training.adam_beta2, training.weight_decay, training.num_train_epochs) == (0.95, 0.05, 1600)
    config = config_from_preset(run.preset)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (
        512,
        8,
        16,
    )


def test_the_recipe_for_millionaid_runs(tmp_path):
    words = ["--config", "mae-b-millionaid", "--preset", "vitae-nano-mae", "--dataset", str(DATA), "--image_size", "64"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--report_to", "none"]
    words += ["--dataloader_num_workers", "0", "--save_strategy", "no", "--eval_strategy", "no", "--crop_pct", "1"]
    record = pretrain.main([*words, "--output_dir", str(tmp_path)])
    assert not AutoConfig.from_pretrained(record["model"]).norm_pix_loss
