"""Without a GPU: no tensor is made on another device than the model's, and nothing waits for a number to leave it.

On fake CUDA tensors, operations check devices and types, compute nothing, and refuse to give a number to Python
(`.item()`) or a shape that depends on numbers. Meta tensors do the same for the backward pass, for which autograd asks
for a real GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import any_size, class_token_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageClassification

from vitae_hf import ViTAEForPreTraining
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss


@contextmanager
def on_fake_cuda(model: nn.Module) -> Iterator[nn.Module]:
    """In the block there is a CUDA device whose tensors hold nothing, and the model, made of meta tensors, is on it."""
    with FakeTensorMode(), torch.device("cuda"):
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        yield model


def on_meta(build: Callable, config) -> nn.Module:
    with torch.device("meta"):
        return build(config)


classifier = partial(on_meta, AutoModelForImageClassification.from_config)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_forward_and_loss_stay_on_the_gpu(tiny_config, training, autocast, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with on_fake_cuda(classifier(tiny_config(drop_path_rate=0.1)).train(training)) as model:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            labels = torch.empty(2, dtype=torch.long)
            outputs = model(torch.empty(2, 3, 96, 64), labels=labels, **any_size(model))
    assert outputs.loss.device.type == outputs.logits.device.type == "cuda"
    assert (outputs.logits.dtype, outputs.loss.dtype) == (torch.bfloat16 if autocast else torch.float32, torch.float32)


def test_a_masked_autoencoder_stays_on_the_gpu():
    with on_fake_cuda(on_meta(ViTAEForPreTraining, class_token_config(conv_kernel_size=1)).train()) as model:
        outputs = model(torch.empty(2, 3, 64, 64))
    assert {value.device.type for value in (outputs.loss, outputs.logits, outputs.mask)} == {"cuda"}


def test_a_training_step_gives_python_no_number(tiny_config):
    """Mixup, erasing, drop path, forward, loss, backward and the optimizer."""
    config = tiny_config(drop_path_rate=0.1)
    model = classifier(config).train()
    augment = DeviceAugmentation(config.num_labels, AugmentationArguments())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    pixels = torch.empty(4, 3, 64, 64, dtype=torch.uint8, device="meta")
    pixel_values, targets = augment(pixels, torch.zeros(4, dtype=torch.long, device="meta"))
    loss = soft_target_loss(model(pixel_values), targets)
    loss.backward()
    optimizer.step()
    assert pixel_values.device.type == targets.device.type == loss.device.type == "meta"
    assert all(weight.grad.device.type == "meta" for weight in model.parameters())
