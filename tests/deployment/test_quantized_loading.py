# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""`from_pretrained` quantises with torchao and bitsandbytes, and what was quantised is saved and loaded again."""

import pytest
import torch
from helpers import ASSETS, IMAGE
from torch import nn
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, TorchAoConfig

from vitae_hf import ViTAEImageProcessorPil, prepare_for_inference
from vitae_hf.deployment.exporting import load_for_export


NANO = ASSETS / "vitae-nano-fashion"
PICTURES = [str(IMAGE), str(ASSETS / "sneaker.png")]


def load(folder=NANO, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    processor = ViTAEImageProcessorPil.from_pretrained(NANO)
    return model(processor(PICTURES, return_tensors="pt").pixel_values).logits


def torchao_config(name: str) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(getattr(quantization, name)())


def eight_bits() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=True)


CONFIGS = {
    "weights": lambda: torchao_config("Int8WeightOnlyConfig"),
    "dynamic": lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes": eight_bits,
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_int8_is_close_and_smaller_and_the_same_when_it_is_loaded_again_and_prepared(kind, tmp_path):
    model, expected = load(quantization_config=CONFIGS[kind]()), logits(load())
    found = logits(model)
    assert 0 < (found - expected).square().mean().sqrt() / expected.std() < 0.05
    assert found.argmax(1).equal(expected.argmax(1))
    model.save_pretrained(tmp_path)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, NANO)]
    assert sizes[0] < 0.75 * sizes[1]
    assert logits(load(tmp_path)).equal(found)
    torch.testing.assert_close(logits(prepare_for_inference(model)), found, rtol=0, atol=1e-2 * expected.std().item())
    with pytest.raises(ValueError, match="are quantised: export the model that they were made from"):
        load_for_export(tmp_path)


def test_four_bits_are_refused_at_loading_where_the_processor_packs_widths_that_do_not_fit(monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is not installed")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    with pytest.raises(ValueError, match=r"multiples of 64 .* \d+ of \d+ layers are not, such as .* load in 8 bits"):
        load(quantization_config=four_bits)
    unfit = [
        name
        for name, layer in load().named_modules()
        if isinstance(layer, nn.Linear) and (layer.in_features % 64 or layer.out_features % 32)
    ]
    four_bits.llm_int8_skip_modules = unfit
    assert logits(load(quantization_config=four_bits)).isfinite().all()
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    assert logits(load(quantization_config=BitsAndBytesConfig(load_in_4bit=True))).isfinite().all()
