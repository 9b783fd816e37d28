"""What several test files need: tiny networks with every code path, golden weights, commands run as users run them."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageClassification, AutoModelForPreTraining

from vitae_cli import COMMANDS
from vitae_hf import ViTAEConfig, ViTAEImageProcessor, ViTAEv2Config, config_from_preset
from vitae_hf.hub.original_names import original_layout


REPOSITORY = Path(__file__).parents[1]
ASSETS = REPOSITORY / "src" / "vitae_hf" / "assets"
IMAGE = ASSETS / "chelsea.png"
DATA = REPOSITORY / "examples" / "fashion_mnist_mini"
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


def rotated_config(**overrides) -> ViTAEConfig:
    """A plain variant whose first cell has rotated windows that do not divide the grid, and whose second is global."""
    tiny = {"image_size": 64, "hidden_sizes": (32,), "reduction_channels": (32,), "num_labels": 5, "qkv_bias": True}
    tiny |= {"depths": (2,), "num_attention_heads": (2,), "conv_groups": (8,)}
    tiny |= {"window_size": 3, "window_type": "rotated_apart", "global_attn_indexes": (1,)}
    return config_from_preset("vitae-b-rvsa", **{**tiny, **overrides})


CONFIGS = {
    "pyramid": pyramid_config,
    "class_token": class_token_config,
    "windowed": windowed_config,
    "rotated": rotated_config,
}


def original_weights(
    config: ViTAEConfig, seed: int = 0, auto_class: type = AutoModelForImageClassification
) -> dict[str, torch.Tensor]:
    """An original-format state dict for any configuration, well conditioned as the golden data's."""
    weights = {}
    for name, parts in original_layout(config, auto_class).items():
        shape = tuple(next(iter(parts.values())))
        shape = (len(parts) * shape[0], *shape[1:]) if shape else ()
        weights[name] = torch.from_numpy(np.asarray(golden_weights.tensor(name, shape, seed)))
    return weights


def autoencoder_weights(config: ViTAEConfig) -> dict[str, torch.Tensor]:
    """The same of a masked autoencoder, the keys of whose encoder have no bias."""
    weights = original_weights(config, auto_class=AutoModelForPreTraining)
    for name in [name for name in weights if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name)]:
        query_bias, _, value_bias = weights.pop(name).chunk(3)
        stem = name.removesuffix("qkv.bias")
        weights |= {f"{stem}q_bias": query_bias, f"{stem}v_bias": value_bias}
    return weights


class RunsCode:
    """Pickled, it makes whoever unpickles it run a command of the shell."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write_malicious(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A file of `torch.save` that writes `PATH.executed` if anything in it is called."""
    torch.save({"state_dict": weights, "args": RunsCode(f"touch {path}.executed")}, path)


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.from_numpy(golden_weights.images(batch, height, width))


def any_size(model: torch.nn.Module) -> dict:
    """What to call a model with, beside images of another size than its own."""
    return {"interpolate_pos_encoding": True} if model.config.is_plain else {}


def run(command: str, *arguments, **variables: str) -> subprocess.CompletedProcess:
    """A command of `vitae`, or a script of `scripts/`, in a process of its own."""
    script = REPOSITORY / "scripts" / f"{command}.py"
    start = ["-m", "vitae_hf", command] if command in COMMANDS else [str(script)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    words = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess) -> dict:
    """The record that a command prints at its end."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LINES = [(31, 119, 180), (255, 127, 14), (44, 160, 44)]  # colours of matplotlib's first, second and third line
SHARD_SIZES = (7, 11, 5, 14, 3)  # rows of the shards: 40


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (64, 64), 5 * index).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(folder, as_text: bool = False):
    import datasets  # here, since machines with a GPU on which only the tests marked `gpu` run may lack it

    label = datasets.Value("string") if as_text else datasets.ClassLabel(names=list("abcde"))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    first = 0
    for shard, size in enumerate(SHARD_SIZES):
        rows = range(first, first + size)
        labels = ["abcde"[i % 5] if as_text else i % 5 for i in rows]
        data = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in rows], "label": labels}
        data = datasets.Dataset.from_dict(data, features=features)
        data.to_parquet(folder / f"train-{shard:05}-of-00005.parquet", batch_size=4)  # rows of a row group
        first += size


def write_several_columns(folder) -> dict[str, list[str]]:
    """Three rows with two columns of pictures, two of class labels and one of text. The names of the classes.

    CIFAR-100 has fine and coarse labels, other data sets have a mask beside each picture.
    """
    import datasets

    names = {"fine": ["ant", "bee", "cat", "dog"], "coarse": ["insect", "pet"]}
    features = {column: datasets.ClassLabel(names=classes) for column, classes in names.items()}
    features |= {"picture": datasets.Image(), "mask": datasets.Image(), "place": datasets.Value("string")}
    rows = {"fine": [3, 0, 1], "coarse": [1, 0, 0], "place": ["sea", "hill", "sea"]}
    rows |= {column: [PIL.Image.new("RGB", (9, 9), (v, v, v))] * 3 for column, v in (("picture", 200), ("mask", 1))}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / "train-0.parquet")
    return names


def drawn(path: Path) -> tuple[tuple[int, int], set[tuple[int, int, int]]]:
    """The size of a picture, and the colours in it: a curve leaves its own, such as those of `LINES`."""
    with PIL.Image.open(path) as picture:
        return picture.size, {colour for _, colour in picture.convert("RGB").getcolors(2**24)}


def vivid(path: Path) -> int:
    """How many colours of a picture are far from grey: heat over a grey image has thousands, lines and text dozens."""
    return sum(max(colour) - min(colour) > 60 for colour in drawn(path)[1])


def save_model(folder: Path, config) -> Path:
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTAEImageProcessor(size=64, crop_pct=1.0).save_pretrained(folder)
    return folder


def write_bad_files(folder: Path) -> dict[str, Path]:
    """Files that are no good pictures, by what is wrong with them."""
    kinds = ("text", "truncated", "bomb", "pixels", "postscript", "empty")
    files = {kind: folder / f"{kind}.png" for kind in kinds}
    files["text"].write_text("no picture at all\n")
    files["truncated"].write_bytes((ASSETS / "chelsea.png").read_bytes()[:20_000])
    PIL.Image.new("1", (20_000, 20_000)).save(files["bomb"])
    PIL.Image.new("1", (8000, 8000)).save(files["pixels"])  # which Pillow would read
    PIL.Image.new("RGB", (20, 20)).save(files["postscript"], format="EPS")
    files["empty"].touch()
    return files


def python_path_without(*packages: str, folder: Path) -> Path:
    """A folder of links to everything installed here but these packages; `python -S` sees nothing else."""
    folder.mkdir()
    site_packages = Path(importlib.metadata.distribution("transformers").locate_file(""))
    for entry in site_packages.iterdir():
        if not entry.name.startswith(packages) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def as_words(values: dict) -> list[str]:
    """Arguments as a command line has them."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def options(**values) -> list[str]:
    common = {"per_device_train_batch_size": 8, "report_to": "none", "logging_steps": 1, "dataloader_drop_last": True}
    return as_words({**common, **values})
