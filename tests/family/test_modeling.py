"""What a Transformers user expects of a vision model, on tiny networks of every kind."""

import copy
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from helpers import CONFIGS, class_token_config, images, pyramid_config, rotated_config, windowed_config
from huggingface_hub.errors import StrictDataclassError
from packaging import version
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.vit.modeling_vit import ViTConfig, ViTEmbeddings
from transformers.utils import is_flash_attn_2_available

from vitae_hf import ViTAEForImageClassification, ViTAEModel, ViTAEv2Model, config_from_preset
from vitae_hf.attention_vitae import random_feature_attention
from vitae_hf.layers_vitae import ViTAEBatchNorm2d, ViTAEConvLayer, ViTAEFamilyCell
from vitae_hf.modeling_vitae import ViTAENormalCell


def classifier(config):
    """A model in eval mode whose BatchNorms have seen data and whose positions are not zero."""
    model = AutoModelForImageClassification.from_config(config)
    if config.has_class_token:
        torch.nn.init.normal_(model.base_model.embeddings.position_embeddings, std=0.2)
    with torch.no_grad():
        model.train()(images(4))
    return model.eval()


# ---------------------------------------------------------------------------------------------------- outputs


def test_outputs_have_the_documented_shapes():
    model = classifier(pyramid_config(attn_implementation="eager"))
    outputs = model.base_model(images(2, 64, 96), output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.shape == (2, 4 * 6, 32)
    assert torch.allclose(outputs.pooler_output, outputs.last_hidden_state.mean(1), atol=1e-6)
    expected = [(2, 3, 64, 96), (2, 16, 16, 24), (2, 24, 8, 12), (2, 32, 4, 6)]
    assert [tuple(feature_map.shape) for feature_map in outputs.hidden_states] == expected
    assert torch.equal(outputs.hidden_states[-1].flatten(2).transpose(1, 2), outputs.last_hidden_state)
    heads_and_tokens = [(3, 96), (2, 24), (2, 24)]  # the softmax cells alone
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, h, n, n) for h, n in heads_and_tokens]
    assert all(torch.allclose(weights.sum(-1), torch.ones(1), atol=1e-5) for weights in outputs.attentions)


def test_windowed_outputs_have_the_documented_shapes():
    model = classifier(windowed_config(attn_implementation="eager"))
    outputs = model.vitaev2(images(2, 64, 96), output_hidden_states=True, output_attentions=True)
    expected = [(2, 3, 64, 96), (2, 16, 16, 24), (2, 24, 8, 12), (2, 32, 4, 6)]
    assert [tuple(feature_map.shape) for feature_map in outputs.hidden_states] == expected
    assert torch.allclose(outputs.pooler_output, outputs.hidden_states[-1].mean((2, 3)), atol=1e-6)
    windows = [(2 * 6 * 8, 1, 9, 9), (2 * 6 * 8, 1, 9, 9), (2 * 2 * 3, 2, 25, 25), (2 * 2 * 3, 3, 25, 25)]
    assert [tuple(weights.shape) for weights in outputs.attentions] == [*windows, *[(2, 2, 24, 24)] * 3]


def test_class_token_outputs_have_the_documented_shapes():
    model = classifier(class_token_config(attn_implementation="eager"))
    outputs = model.base_model(images(2), output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.shape == (2, 17, 32)
    assert [tuple(tokens.shape) for tokens in outputs.hidden_states] == [(2, 17, 32), (2, 17, 32)]
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 17, 17)] * 2
    pooled = model.base_model.pooler.layernorm(outputs.last_hidden_state[:, 1:].mean(1))
    assert torch.allclose(outputs.pooler_output, pooled, atol=1e-6)
    assert torch.allclose(model(images(2)).logits, model.classifier(pooled), atol=1e-6)


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="newer than this library")
def test_hidden_states_can_be_selected_by_index(tiny_config):
    model = classifier(tiny_config())
    every = model(images(), output_hidden_states=True).hidden_states
    selected = model(images(), output_hidden_states=[-1]).hidden_states
    assert torch.equal(selected[-1], every[-1]) and all(state is None for state in selected[:-1])


def test_return_dict_false_gives_a_tuple(tiny_config):
    model = classifier(tiny_config())
    logits = model(images(), return_dict=False)
    assert isinstance(logits, tuple) and torch.equal(logits[0], model(images()).logits)
    loss, logits = model(images(), labels=torch.tensor([0, 1]), return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 5)


def test_a_classifier_also_gives_what_it_reads(tiny_config):
    model = classifier(tiny_config())
    outputs = model(images(), labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert torch.equal(outputs.pooler_output, model.base_model(images()).pooler_output)
    assert torch.equal(outputs.logits, model.classifier(outputs.pooler_output))
    assert len(outputs[:]) == 3 and outputs[-1] is outputs.hidden_states  # as a tuple it is the library's output


@pytest.mark.parametrize("kind", ["captions", "clip"])
def test_models_of_language_see_through_it(tiny_config, kind, tmp_path):
    writer = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    inputs = {"pixel_values": images()}
    words = torch.tensor([[0, 5, 7], [0, 3, 1]])
    if kind == "captions":
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(tiny_config(), writer, pad_token_id=1)
        config.decoder_start_token_id = 0
        model, inputs = VisionEncoderDecoderModel(config), {**inputs, "labels": words}
    else:
        reader = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        model = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(tiny_config(), reader))
        inputs |= {"input_ids": words, "return_loss": True}
    model.train()(**inputs).loss.backward()
    eye = model.encoder if kind == "captions" else model.vision_model
    unused = [name for name, weight in eye.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not [name for name in unused if kind == "clip" or "pooler" not in name]  # captions are of tokens
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(**inputs)
        assert torch.equal(again.loss, model(**inputs).loss)


def test_trainer_keeps_nothing_but_logits(tiny_config, tmp_path):
    rows = [{"pixel_values": image, "labels": torch.tensor(1)} for image in images(3)]
    arguments = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    prediction = transformers.Trainer(classifier(tiny_config()), arguments).predict(rows)
    assert prediction.predictions.shape == (3, 5)


def test_each_batch_element_is_classified_by_itself(tiny_config):
    model = classifier(tiny_config())
    together, alone = model(images(3)).logits, torch.cat([model(image[None]).logits for image in images(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
    "labels, problem_type, expected",
    [
        (torch.tensor([1, 4]), None, torch.nn.CrossEntropyLoss()),
        (torch.tensor([[0.0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]), None, torch.nn.BCEWithLogitsLoss()),
        (torch.randn(2, 5), "regression", torch.nn.MSELoss()),
    ],
)
def test_losses_are_the_librarys(labels, problem_type, expected):
    model = classifier(pyramid_config(problem_type=problem_type))
    outputs = model(images(), labels=labels)
    assert torch.allclose(outputs.loss, expected(outputs.logits, labels))
    with torch.no_grad():  # a Trainer that accumulates batches tells how many labels all of them have, and adds up
        model.eval()
        whole = model(images(), labels=labels).loss
        parts = [
            model(images()[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=labels.numel()) for i in (0, 1)
        ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("height, width, nearest", [(60, 64, "height 48 or 64 and width 64"), (64, 7, "width 16")])
def test_a_size_off_the_stride_names_the_nearest(tiny_config, height, width, nearest):
    with pytest.raises(ValueError, match=f"multiples of 16.*{nearest}"):
        AutoModel.from_config(tiny_config())(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64)])
def test_wrong_shapes_are_named(tiny_config, shape):
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\).*got \(" + str(shape[0])):
        AutoModel.from_config(tiny_config())(torch.zeros(shape))


def test_missing_pixels_are_named(tiny_config):
    with pytest.raises(ValueError, match="specify pixel_values"):
        AutoModel.from_config(tiny_config())()


def test_positions_are_interpolated_only_when_asked_and_as_vit_does(tiny_config):
    model = classifier(tiny_config()).base_model
    if not model.config.is_plain:
        model(images(1, 96, 32))  # no positions, nothing to ask for
        return
    with pytest.raises(ValueError, match=r"Input image size \(96\*32\) doesn't match model \(64\*64\)"):
        model(images(1, 96, 32))
    vit = ViTEmbeddings(ViTConfig(hidden_size=32, image_size=64, patch_size=16))
    first = int(model.config.has_class_token)
    vit.position_embeddings.data[:, 1 - first :] = model.embeddings.position_embeddings.data
    expected = vit.interpolate_pos_encoding(torch.zeros(1, 1 + 6 * 2, 32), 96, 32)[:, 1 - first :]
    assert torch.allclose(model.embeddings.interpolate_pos_encoding((6, 2)), expected, atol=1e-6)
    assert model(images(1, 96, 32), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 12 + first, 32)


# ------------------------------------------------------------------------- attention, dtypes, compilers, export


@pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        pytest.param(
            "flex_attention",
            marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")],
        ),
    ],
)
@torch.no_grad()  # flex attention has no backward pass on a CPU
def test_attention_backends_agree_with_eager(implementation):
    model = classifier(class_token_config(attn_implementation="eager"))
    expected = model(images()).logits
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    assert torch.allclose(model(images()).logits, expected, atol=1e-5)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_flash_attention_lacks_nothing_but_its_package(tiny_config):
    """The library refuses it to models that do not support it before it looks for the package."""
    config, lacks = tiny_config(), (ImportError, "the package for FlashAttention2 doesn't seem to be installed")
    if config.adds_to_scores:
        lacks = ValueError, "does not support Flash Attention 2"
    with pytest.raises(lacks[0], match=lacks[1]):
        AutoModel.from_config(config, attn_implementation="flash_attention_2")


def random_projections(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "random_projection" in name]


def test_random_projections_are_float32_wherever_the_model_is_bfloat16(tmp_path):
    config = pyramid_config(out_features=["stage1", "stage2", "stage3"])
    model = AutoModel.from_config(config, dtype=torch.bfloat16)
    detector_config = transformers.RTDetrConfig(backbone_config=config, encoder_in_channels=[16, 24, 32])
    detector = transformers.RTDetrForObjectDetection(detector_config)
    detector.save_pretrained(tmp_path)
    half = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == half.dtype == torch.bfloat16
    assert all(map(torch.equal, random_projections(half), random_projections(detector)))
    cast = [detector.half(), AutoModel.from_config(config).to(torch.bfloat16), AutoModel.from_config(config).double()]
    for network in (model, half, *cast):
        assert {projection.dtype for projection in random_projections(network)} == {torch.float32}


def test_what_stays_float32_is_named_where_it_exists(tiny_config):
    model = AutoModel.from_config(tiny_config())
    assert model._keep_in_fp32_modules_strict == ({"random_projection"} if random_projections(model) else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tiny_config, dtype, tmp_path):
    model = classifier(tiny_config())
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype
    logits, expected = half(images()).logits, model(images()).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1, 10, 100, "worst"])
def test_random_features_are_finite_for_any_activation(dtype, scale):
    """Values and gradients; the worst activations equal the random directions themselves, in stage 2 of ViTAE-S."""
    projection = torch.nn.init.orthogonal_(torch.empty(96, 192), gain=96**0.5)
    states = [projection[None] if scale == "worst" else scale * torch.randn(2, 64, 192) for _ in range(3)]
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in states)
    output = random_feature_attention(query, key, value, projection)
    assert output.dtype == dtype and output.isfinite().all()
    output.float().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def test_autocast_leaves_the_random_features_in_float32():
    projection, states = torch.randn(8, 16), torch.randn(3, 1, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = random_feature_attention(*states, projection)
    assert torch.equal(output, random_feature_attention(*states, projection))


def test_compiles_without_graph_breaks(tiny_config):
    model = classifier(tiny_config())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs = compiled(images(), labels=torch.tensor([0, 1]))
    assert torch.allclose(outputs.logits, model(images()).logits, atol=1e-5)
    assert torch.allclose(outputs.pooler_output, model(images()).pooler_output, atol=1e-5)


ONE_WINDOWED_STAGE = {  # tracing the shapes of several takes minutes
    "strides": (4,),
    "reduction_kernel_sizes": (7,),
    "reduction_dilations": ((1, 2),),
    "reduction_channels": (8,),
    "reduction_conv_groups": (1,),
    "reduction_num_attention_heads": (1,),
    "hidden_sizes": (16,),
    "depths": (1,),
    "num_attention_heads": (2,),
    "window_sizes": (3,),
    "conv_groups": (4,),
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(pyramid_config(), marks=pytest.mark.slow),
        class_token_config(),
        pytest.param(windowed_config(**ONE_WINDOWED_STAGE), marks=pytest.mark.slow),
        rotated_config(window_size=2),  # such a program takes no grid of a single row or column of windows
        pytest.param(windowed_config(**ONE_WINDOWED_STAGE, window_padding="end"), marks=pytest.mark.slow),
    ],
    ids=[*CONFIGS, "padded_at_the_end"],
)
def test_exports_with_dynamic_batch_height_and_width(config):
    model = classifier(config)
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))
    shapes = {"pixel_values": {0: batch, 2: 16 * rows, 3: 16 * columns}, "interpolate_pos_encoding": None}
    arguments = {"pixel_values": images(2, 64, 96), "interpolate_pos_encoding": True}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes)
    for size in ((3, 48, 64), (2, 64, 64)):
        arguments["pixel_values"] = images(*size)
        assert torch.allclose(program.module()(**arguments).logits, model(**arguments).logits, atol=1e-5), size


# ------------------------------------------------------------------------------------- training, checkpointing


def gradients_and_statistics(model, reentrant: bool | None):
    model = copy.deepcopy(model).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    model(images(4), labels=torch.arange(4)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_config, reentrant):
    """Same gradients, with dropout and drop path on, and BatchNorm statistics that saw each batch once."""
    model = AutoModelForImageClassification.from_config(tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.3))
    expected_gradients, expected_buffers = gradients_and_statistics(model, None)
    gradients, buffers = gradients_and_statistics(model, reentrant)
    # The first pass of reentrant checkpointing records no gradient, for which torch may choose another kernel.
    assert all(torch.allclose(buffers[name], value, atol=1e-6) for name, value in expected_buffers.items())
    for name, value in expected_gradients.items():
        assert gradients[name] is not None and torch.allclose(gradients[name], value, atol=1e-6), name


def test_gradient_checkpointing_recomputes_every_cell(tiny_config, monkeypatch):
    model = AutoModelForImageClassification.from_config(tiny_config()).train()
    model.gradient_checkpointing_enable()
    passes = []
    for cell in model.modules():
        if isinstance(cell, ViTAEFamilyCell):
            cell.layernorm_before.register_forward_hook(lambda *_: passes.append(1))
    cells = sum(isinstance(cell, ViTAEFamilyCell) for cell in model.modules())
    loss = model(images(), labels=torch.tensor([0, 1])).loss
    assert len(passes) == cells
    loss.backward()
    assert len(passes) == 2 * cells


def test_the_checkpoint_function_of_a_cell_can_be_patched():
    """And is then what it was; the library's own tests patch it."""
    model = AutoModelForImageClassification.from_config(pyramid_config()).train()
    model.gradient_checkpointing_enable()
    cell = next(module for module in model.modules() if isinstance(module, ViTAEFamilyCell))
    with patch.object(
        cell, "_gradient_checkpointing_func", side_effect=lambda function, *args: function(*args)
    ) as mock:
        model(images())
    mock.assert_called_once()
    model(images(), labels=torch.tensor([0, 1])).loss.backward()
    assert {int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name} == {2}
    del cell._gradient_checkpointing_func
    assert not hasattr(cell, "_gradient_checkpointing_func")


@pytest.mark.slow
def test_compiled_checkpointing_counts_each_batch_once(tiny_config):
    model = AutoModelForImageClassification.from_config(
        tiny_config(drop_path_rate=0.0, reduction_dropout_prob=0.0)
    ).train()
    plain = copy.deepcopy(model)
    plain(images(4), labels=torch.arange(4)).loss.backward()
    model.gradient_checkpointing_enable()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images(4), labels=torch.arange(4)).loss.backward()
    for (name, expected), buffer in zip(plain.named_buffers(), model.buffers()):
        assert torch.allclose(expected.float(), buffer.float(), atol=1e-5), name


def replicate(module: torch.nn.Module) -> torch.nn.Module:
    """As `nn.DataParallel`, which Trainer takes on a machine with several GPUs: replicas have no parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica


def test_a_frozen_batch_norm_is_frozen_in_replicas_too(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config()).train()
    model.base_model.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    replicate(model)(images(4), labels=torch.arange(4)).loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_replicas_of_data_parallel_work_and_count_their_batches_once(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config()).train()
    model.gradient_checkpointing_enable()
    replica = replicate(model)
    assert not list(replica.parameters())
    replica(images(4), labels=torch.arange(4)).loss.backward()
    batches = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(batches) == {1} and model.classifier.weight.grad is not None


@pytest.mark.parametrize("dtype, spread, tolerance", [(torch.float32, 0.02, 1e-5), (torch.bfloat16, 3, 2e-2)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_batch_norm_and_silu_in_one_equal_those_of_torch(dtype, spread, tolerance, kernel_size):
    layer = ViTAEConvLayer(8, 16, kernel_size, groups=2)
    nn.init.uniform_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    layer = layer.to(dtype)
    plain = nn.Sequential(*copy.deepcopy(layer).children())  # convolution, BatchNorm, SiLU
    pixels = (spread * torch.randn(4, 8, 10, 12) + 1).to(dtype, memory_format=torch.channels_last).requires_grad_()
    outputs, gradients = [], []
    for network in (layer, plain):
        output = network(pixels)
        weights = [*network.parameters(), pixels]
        gradients.append(torch.autograd.grad((output.float() * torch.arange(12)).sum(), weights))
        outputs.append(output)
    assert type(outputs[0].grad_fn).__name__ == "BatchNormSiLUBackward"
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(layer.buffers(), plain.buffers()))
    for own, expected in zip(*gradients):
        # The bias before a BatchNorm has no gradient but rounding.
        assert (own - expected).abs().max() <= tolerance * max(gradients[1][0].abs().max(), expected.abs().max())


def test_one_value_per_channel_is_torchs_error(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config(image_size=16)).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(images(1, 16, 16))
    model(images(2, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_one_value_per_channel_is_an_error_when_compiled_too():
    layer = ViTAEConvLayer(3, 8).train()
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
        compiled(torch.randn(1, 3, 1, 1))
    compiled(torch.randn(2, 3, 1, 1)).sum().backward()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


def trained_layer(track_running_stats: bool = True) -> tuple[ViTAEConvLayer, nn.Sequential]:
    """A convolution layer in training mode, and the same of torch's modules."""
    layer = ViTAEConvLayer(3, 8).double().train()
    nn.init.uniform_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    if not track_running_stats:
        layer.norm = ViTAEBatchNorm2d(8, track_running_stats=False).double()
    plain = nn.Sequential(copy.deepcopy(layer.conv), nn.BatchNorm2d(8, track_running_stats=track_running_stats))
    plain[1].double().load_state_dict(layer.norm.state_dict())
    return layer, plain.append(nn.SiLU())


def gradient_penalty(network: nn.Module, weights: tuple, feature_map: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(network(feature_map).square().sum(), feature_map, create_graph=True)
    return torch.cat([weight.flatten() for weight in torch.autograd.grad(gradient.square().sum(), weights)])


def loss_by_weights(network: nn.Module, weights: tuple, feature_map: torch.Tensor) -> torch.Tensor:
    tensors = {name: tensor.detach().clone() for name, tensor in network.named_buffers()}
    tensors |= zip(dict(network.named_parameters()), weights)
    return torch.func.functional_call(network, tensors, feature_map).square().sum()


def functional_gradient(network: nn.Module, weights: tuple, feature_map: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.func.grad(partial(loss_by_weights, network))(weights, feature_map)])


def forward_derivative(network: nn.Module, weights: tuple, feature_map: torch.Tensor) -> torch.Tensor:
    weights = tuple(weight.detach() for weight in weights)
    loss = partial(loss_by_weights, network, feature_map=feature_map)
    return torch.func.jvp(lambda *weights: loss(weights), weights, tuple(map(torch.ones_like, weights)))[1]


@pytest.mark.parametrize("derive", [gradient_penalty, functional_gradient, forward_derivative])
def test_derivatives_in_training_are_those_of_torchs_modules(derive):
    for networks in (trained_layer(), trained_layer(track_running_stats=False)):
        feature_map = images().double().requires_grad_()
        own, expected = (derive(network, tuple(network.parameters()), feature_map) for network in networks)
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_of_each_image_by_vmap_are_those_of_one_after_the_other(tiny_config, trains):
    """In training mode without running statistics, which `torch.vmap` does not allow any BatchNorm to change."""
    model = AutoModelForImageClassification.from_config(tiny_config(drop_path_rate=0.0, reduction_dropout_prob=0.0))
    torch.func.replace_all_batch_norm_modules_(model.train(trains)) if trains else model.eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, pixel_values, label):
        arguments = {"pixel_values": pixel_values[None], "labels": label[None]}
        return torch.func.functional_call(model, weights, (), arguments).loss

    pixel_values, labels = images(3), torch.arange(3)
    gradients = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weights, pixel_values, labels)
    for index in range(3):
        model.zero_grad()
        model(pixel_values[index : index + 1], labels=labels[index : index + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad, rtol=1e-3, atol=1e-5)


def test_hooks_of_every_layer_are_called_in_training():
    layer, plain = trained_layer()
    called = []
    for module in (layer.norm, layer.activation_fn):
        module.register_forward_pre_hook(lambda module, inputs: called.append(("pre", type(module))))
        module.register_forward_hook(lambda module, inputs, output: called.append(("forward", type(module))))
        module.register_full_backward_hook(lambda module, *gradients: called.append(("backward", type(module))))
    output = layer(images().double())
    output.sum().backward()
    assert torch.equal(output, plain(images().double()))
    kinds = (ViTAEBatchNorm2d, nn.SiLU)
    assert set(called) == {(when, kind) for when in ("pre", "forward", "backward") for kind in kinds}
    assert layer.norm.num_batches_tracked == 1


def test_one_training_step_reaches_every_parameter(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config(drop_path_rate=0.0)).train()
    model(images(), labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_drop_path_rates_rise_linearly_over_all_normal_cells_and_drop_whole_samples():
    model = ViTAEModel(config_from_preset("vitae-nano", depths=(0, 0, 5), drop_path_rate=0.4))
    drop_paths = [cell.drop_path for stage in model.stages for cell in stage.normal_cells]
    assert [path.rate for path in drop_paths] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    dropped = drop_paths[-1].train()(torch.ones(2000, 3, 4))
    assert torch.allclose(dropped.unique(), torch.tensor([0, 1 / 0.6]))
    assert (dropped == dropped[:, :1, :1]).all() and dropped.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(drop_paths[-1].eval()(dropped), dropped)


def test_attention_and_branch_are_dropped_independently():
    cell = ViTAENormalCell(pyramid_config(drop_path_rate=0.5), 2, 1).train()
    draws = []
    cell.drop_path.register_forward_hook(lambda module, inputs, output: draws.append(output[:, 0, 0] != 0))
    cell(torch.randn(64, 16, 32), 4, 4)
    assert len(draws) == 3 and not torch.equal(draws[0], draws[1])


# ------------------------------------------------------------------------------------------ weights and folders


def test_initialisation_follows_the_authors():
    model = ViTAEForImageClassification(config_from_preset("vitae-t", num_labels=10))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1) and not module.bias.any(), name
        elif isinstance(module, torch.nn.Conv2d):  # PyTorch's default: uniform within 1/√fan_in
            bound = module.weight[0].numel() ** -0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert 0 < module.bias.abs().max() <= bound, name
        elif isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any(), name
    projection = model.base_model.stages[0].reduction_cell.attention.random_projection
    assert torch.allclose(projection @ projection.T, 32 * torch.eye(32), atol=1e-4)


def test_saved_models_reload_bitwise_through_the_auto_classes(tiny_config, tmp_path):
    model = classifier(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(images()).logits, model(images()).logits)
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(base.eval()(images()).pooler_output, model.base_model(images()).pooler_output)
    base.save_pretrained(tmp_path / "base")
    fresh_head = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(fresh_head.base_model(images()).pooler_output, model.base_model(images()).pooler_output)


def test_weights_come_from_memory_and_need_no_folder(tiny_config, tmp_path):
    model = classifier(tiny_config())
    loaded = type(model).from_pretrained(None, config=tiny_config(), state_dict=model.state_dict())
    assert torch.equal(loaded.eval()(images()).logits, model(images()).logits)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = type(model).from_pretrained(tmp_path, config=tiny_config())
    assert torch.equal(loaded.eval()(images()).logits, model(images()).logits)


def test_only_the_parts_of_other_classes_go_unreported(tiny_config, tmp_path):
    model = AutoModelForImageClassification.from_config(tiny_config())
    model.save_pretrained(tmp_path)
    backbone_class = type(AutoBackbone.from_config(tiny_config()))
    for other in (type(model.base_model), backbone_class, type(model)):
        assert not other.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]
    state_dict = {**model.state_dict(), "classifier.other": torch.ones(1), "stages.9.other": torch.ones(1)}
    own = {"classifier.other", "stages.9.other"}
    for other, expected in ((type(model), own), (backbone_class, {"stages.9.other"})):
        _, report = other.from_pretrained(None, config=tiny_config(), state_dict=state_dict, output_loading_info=True)
        assert report["unexpected_keys"] == expected
    assert not any("classifier" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)


def test_a_new_head_is_drawn_and_the_rest_kept_with_ignore_mismatched_sizes(tiny_config, tmp_path):
    model = classifier(tiny_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    names = {0: "cat", 1: "dog", 2: "fox"}
    resized = AutoModelForImageClassification.from_pretrained(
        tmp_path, id2label=names, ignore_mismatched_sizes=True
    ).eval()
    assert resized.classifier.out_features == 3 and resized.config.id2label == names
    assert resized.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(resized.base_model(images()).pooler_output, model.base_model(images()).pooler_output)


def test_device_map_places_whole_cells(tiny_config, tmp_path):
    """`auto`, and a map made by accelerate for a memory so small that cells are offloaded to disk."""
    model = classifier(tiny_config())
    model.save_pretrained(tmp_path)
    automatic = AutoModelForImageClassification.from_pretrained(tmp_path, device_map="auto").eval()
    assert torch.equal(automatic(images()).logits, model(images()).logits)
    device_map = infer_auto_device_map(
        model, {"cpu": int(0.8 * model.get_memory_footprint()), "disk": "1GB"}, model._no_split_modules
    )
    offloaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    on_disk = [name for name, device in offloaded.hf_device_map.items() if device == "disk"]
    assert 0 < len(on_disk) < len(device_map)
    assert not any(part in name for name in on_disk for part in ("attention", "conv_branch", "mlp"))
    assert torch.equal(offloaded(images()).logits, model(images()).logits)


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["classifier", "norm"]}], ids=str)
def test_lora_comes_back_as_what_was_trained(tiny_config, options, tmp_path):
    """By the library's Trainer, saved and loaded with nothing else."""
    peft = pytest.importorskip("peft")
    model = classifier(tiny_config())
    lora = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    rows = [{"pixel_values": pixels, "labels": index % 2} for index, pixels in enumerate(images(4))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.1, gradient_checkpointing=True, save_strategy="no", disable_tqdm=True
    )
    transformers.Trainer(adapted, arguments, train_dataset=rows).train()
    attentions = len([module for module in model.modules() if hasattr(module, "o_proj")])
    assert (
        len([name for name, weight in adapted.named_parameters() if "lora_B" in name and weight.any()])
        == 4 * attentions
    )
    adapted.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    logits = adapted.eval()(pixel_values=images()).logits
    assert torch.allclose(restored(pixel_values=images()).logits, logits, atol=1e-5)
    assert not torch.allclose(logits, model(images()).logits, atol=1e-3)


@pytest.mark.parametrize("make", [pyramid_config, class_token_config, windowed_config])
def test_a_mask_that_is_none_is_passed_over_and_another_is_refused(make):
    """PEFT gives one to every model that extracts features."""
    peft = pytest.importorskip("peft")
    model = AutoModel.from_config(make()).eval()
    expected = model(images()).last_hidden_state
    with pytest.raises(ValueError, match="`attention_mask` must be None"):
        model(images(), attention_mask=torch.ones(2, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"))
    assert torch.allclose(adapted(pixel_values=images()).last_hidden_state, expected, atol=1e-5)


def test_a_batch_norm_with_a_frozen_weight_keeps_its_statistics():
    layer = ViTAEConvLayer(3, 8).train()
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        layer.requires_grad_(False)
        buffers = copy.deepcopy(dict(layer.named_buffers()))
        assert torch.equal(forward(images()), copy.deepcopy(layer).eval()(images()))
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())
        layer.requires_grad_(True)
        torch.compiler.reset()  # torch 2.11 does not see that a weight has been frozen since it was compiled
        forward(images())
        assert not any(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())


def test_a_damaged_file_of_weights_is_named(tiny_config, tmp_path):
    """Of several, the one that is; the library's own error names none."""
    classifier(tiny_config()).save_pretrained(tmp_path, max_shard_size="50KB")
    damaged = sorted(tmp_path.glob("*.safetensors"))[1]
    damaged.write_bytes(b"\xff" * 8 + damaged.read_bytes()[8:])
    with pytest.raises(OSError, match=f"the weights in \\S*{damaged.name} are damaged: .*header"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_dropout_is_where_the_authors_have_it():
    """After the projection and both layers of the MLP of normal cells; ViTAEv2's reduction cells have none."""
    model = ViTAEv2Model(windowed_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2))
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    cell = "stages.1.normal_cells.0"
    assert {name for name, rate in rates.items() if rate and cell in name} == {
        f"{cell}.attention.dropout",
        f"{cell}.mlp.dropout",
        f"{cell}.dropout",
    }
    assert not any(rate for name, rate in rates.items() if "reduction_cell" in name)
    assert [stage.reduction_cell.attention.attention_dropout for stage in model.stages] == [0, 0, 0]
    assert model.stages[1].normal_cells[0].attention.attention_dropout == 0.2


def test_another_image_size_becomes_the_models_own(tiny_config, tmp_path):
    model = AutoModelForImageClassification.from_config(tiny_config()).eval()
    if model.config.is_plain:
        torch.nn.init.normal_(model.base_model.embeddings.position_embeddings)
    for table in (weight for name, weight in model.named_parameters() if "rel_pos" in name):
        torch.nn.init.normal_(table)
    pixels = images(2, 96, 32)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).logits
        model.resize_position_embeddings((96, 32))
        assert torch.equal(model(pixels).logits, expected)
        assert torch.equal(model(pixels, interpolate_pos_encoding=True).logits, expected)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert reloaded.config.image_height_width == (96, 32)
    reloaded(pixels).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in reloaded.parameters())
    with torch.no_grad():
        assert torch.equal(reloaded(pixels).logits, expected)
    with pytest.raises(StrictDataclassError, match="image_size"):
        model.resize_position_embeddings(90)
    assert model.config.image_height_width == (96, 32)
