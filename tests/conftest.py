"""Tiny networks that have every code path, and the golden data's weights."""

import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores, and so do those that they start
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from vitae_hf import ViTAEConfig, ViTAEv2Config, config_from_preset  # noqa: E402
from vitae_hf.hub.conversion import original_layout  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"
sys.path += [str(GOLDEN), str(REPOSITORY / "scripts")]

import golden_weights  # noqa: E402


def pyramid_config(**overrides) -> ViTAEConfig:
    """Three stages, normal cells in two of them, grouped convolutions in both kinds of cell."""
    fields = {
        "image_size": 64,
        "reduction_channels": (8, 8, 16),
        "reduction_conv_groups": (1, 2, 1),
        "hidden_sizes": (16, 24, 32),
        "depths": (0, 1, 2),
        "num_attention_heads": (1, 3, 2),
        "conv_groups": (1, 6, 8),
        "mlp_ratio": 2.0,
        "num_labels": 5,
    }
    return ViTAEConfig(**{**fields, **overrides})


def class_token_config(**overrides) -> ViTAEConfig:
    tiny = {"image_size": 64, "hidden_sizes": (32,), "reduction_channels": (32,), "num_labels": 5}
    tiny |= {"depths": (2,), "num_attention_heads": (2,), "conv_groups": (8,)}
    return config_from_preset("vitae-b", **{**tiny, **overrides})


def windowed_config(**overrides) -> ViTAEv2Config:
    """ViTAEv2 in three stages, windows that do not divide the maps in two of them."""
    fields = {
        "image_size": 64,
        "strides": (4, 2, 2),
        "reduction_kernel_sizes": (7, 3, 3),
        "reduction_dilations": ((1, 2, 3), (1, 2), (1, 2)),
        "reduction_channels": (8, 8, 16),
        "reduction_conv_groups": (1, 2, 4),
        "reduction_num_attention_heads": (1, 2, 2),
        "hidden_sizes": (16, 24, 32),
        "depths": (1, 1, 2),
        "num_attention_heads": (1, 3, 2),
        "window_sizes": (3, 5, None),
        "conv_groups": (1, 6, 8),
        "mlp_ratio": 2.0,
        "num_labels": 5,
    }
    overrides.pop("reduction_dropout_prob", None)  # a field of ViTAE alone
    return ViTAEv2Config(**{**fields, **overrides})


CONFIGS = {"pyramid": pyramid_config, "class_token": class_token_config, "windowed": windowed_config}


@pytest.fixture(params=list(CONFIGS))
def tiny_config(request):
    """A function that makes the tiny configuration of each kind, with overrides."""
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads_stay():
    """A command that sets the number of threads, which decides the last bits, sets it for the whole process."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def compiled_anew():
    """All models share the library's code, of which torch 2.11 compiles eight versions in a process and no more."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def original_weights(config: ViTAEConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """An original-format state dict for any configuration, well conditioned as the golden data's."""
    weights = {}
    for name, parts in original_layout(config).items():
        shape = tuple(next(iter(parts.values())))
        shape = (len(parts) * shape[0], *shape[1:]) if shape else ()
        weights[name] = torch.from_numpy(np.asarray(golden_weights.tensor(name, shape, seed)))
    return weights


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.from_numpy(golden_weights.images(batch, height, width))


def any_size(model: torch.nn.Module) -> dict:
    """What to call a model with, beside images of another size than its own."""
    return {"interpolate_pos_encoding": True} if model.config.has_class_token else {}
