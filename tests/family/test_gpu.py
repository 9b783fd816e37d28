"""On a GPU: the authors' logits, half precision, training that waits for nothing, compilation, one process of NCCL."""

import measure_parity
import pytest
import torch
from helpers import CONFIGS, golden_weights
from torch import nn
from transformers import AutoModelForImageClassification

from vitae_hf import ViTAEForPreTraining, prepare_for_inference
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss
from vitae_hf.deployment.benchmarking import set_precision


pytestmark = pytest.mark.gpu
NO_NOISE = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "reduction_dropout_prob": 0.0}


def classifier(config, **options) -> nn.Module:
    return AutoModelForImageClassification.from_config(config, **options).cuda()


def pixels(batch: int = 4, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(golden_weights.images(batch, side, side)).cuda()


@pytest.fixture
def without_tf32():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    set_precision("float32")
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("name", ["vitae-t", "vitae-s", "vitae-b", "vitae-b-rvsa", "vitaev2-s"])
def test_logits_are_the_authors(name, without_tf32):
    errors = measure_parity.measure(name, "cuda")
    assert errors["float32"]["max_over_std"] < 2e-5
    assert errors["bfloat16"]["max_over_range"] < 2e-2 and errors["float16"]["max_over_range"] < 5e-3
    assert all(found["finite"] and found["finite_at_100_times"] for found in errors.values())


def test_a_step_of_training_never_waits_for_the_gpu(tiny_config):
    """Augmentation, drop path, autocast, backward and the optimizer, with torch's own alarm for synchronisation."""
    model = classifier(tiny_config(drop_path_rate=0.1)).train()
    augment = DeviceAugmentation(
        model.config.num_labels, AugmentationArguments(erasing_prob=0.0)
    )  # timm's erasing waits
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = (255 * torch.rand(4, 3, 64, 64, device="cuda")).byte(), torch.arange(4, device="cuda")

    def step():
        pixel_values, targets = augment(*batch)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(pixel_values)
        loss = soft_target_loss(outputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()  # cudnn and the optimizer prepare themselves
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_float16_trains_with_scaled_gradients(tiny_config):
    model, scaler = classifier(tiny_config()).train(), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.float16):
            losses.append(model(pixels(), labels=torch.arange(4, device="cuda")).loss)
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and all(loss.isfinite() for loss in losses)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_backends_agree(tiny_config, attention, without_tf32):
    model = classifier(tiny_config()).eval()
    expected = model(pixels()).logits
    model.set_attn_implementation(attention)
    assert (model(pixels()).logits - expected).abs().max() < 1e-4 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_a_prepared_model_agrees(tiny_config, compile, without_tf32):
    model = classifier(tiny_config()).eval()
    expected = model(pixels()).logits
    found = prepare_for_inference(model, compile=compile)(pixels()).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_compiled_training_agrees(tiny_config, without_tf32):
    model = classifier(tiny_config(**NO_NOISE)).train()
    losses = []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        loss = run(pixels(), labels=torch.arange(4, device="cuda")).loss
        loss.backward()
        losses.append((loss.item(), next(model.parameters()).grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_nccl_and_synchronised_norms_give_the_loss_of_the_plain_model(tiny_config, without_tf32):
    model = classifier(tiny_config(**NO_NOISE)).train()

    def loss(run: nn.Module) -> float:
        return run(pixels(), labels=torch.arange(4, device="cuda")).loss.item()

    expected = loss(model)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        assert loss(wrapped) == pytest.approx(expected, rel=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_masked_autoencoder_trains():
    model = ViTAEForPreTraining(CONFIGS["class_token"](conv_kernel_size=1)).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(pixels()).loss
    loss.backward()
    assert loss.isfinite() and all(weight.grad is not None for weight in model.decoder.parameters())
