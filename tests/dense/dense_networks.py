"""What the tests of dense prediction share: tiny backbones, and what must hold of every network around one."""

import datasets
import numpy as np
import PIL.Image
import torch
from helpers import REPOSITORY, class_token_config, pyramid_config, windowed_config

from vitae_hf.dense.backbone import dense_config


SCENES = REPOSITORY / "examples" / "garment_scenes"
NAMES = dict(enumerate("abcde"))
BACKBONES = {
    "pyramid": lambda **changes: dense_config(pyramid_config(drop_path_rate=0.0), **changes),
    "class_token": lambda **changes: dense_config(
        class_token_config(drop_path_rate=0.0), feature_pyramid_channels=16, **changes
    ),
    "windowed": lambda **changes: dense_config(windowed_config(drop_path_rate=0.0), **changes),
}


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


def masked_rows(*rows: tuple) -> datasets.Dataset:
    """A split of pictures and masks, given as arrays or PIL images."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = [
        {"image": PIL.Image.fromarray(np.asarray(image)), "mask": PIL.Image.fromarray(np.asarray(mask))}
        for image, mask in rows
    ]
    split = datasets.Dataset.from_list(rows, features=features)
    return split.cast_column("image", datasets.Image(decode=False)).cast_column("mask", datasets.Image(decode=False))
