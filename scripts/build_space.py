# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I show a model to everyone? Writes the web page for it as a folder that runs as a Hugging Face Space.

    python scripts/build_space.py org/vitae-mine --output outputs/space

The folder holds the source of this package, so that the Space needs nothing else. If the model is a folder, it is
copied too. `python outputs/space/app.py` runs the page here. These commands publish it, or update it:

    hf repos create org/vitae-mine-page --type space --space-sdk gradio --exist-ok
    hf upload org/vitae-mine-page outputs/space --type space
"""

import argparse
import configparser
import shutil
import sys
from pathlib import Path

import gradio

import vitae_hf
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import find_model, size_of
from vitae_hf.hub.cards import space_card
from vitae_hf.web.visitors import MODEL_FILES, Models


REPOSITORY = Path(__file__).parents[1]
APP = '''"""A web page that shows what a ViTAE model sees in a picture; see README.md."""

import os
from pathlib import Path


os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.chdir(Path(__file__).parent)

from vitae_hf.files import PICTURES  # noqa: E402
from vitae_hf.web.page import serve  # noqa: E402
from vitae_hf.web.visitors import Models  # noqa: E402


if __name__ == "__main__":
    host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    names = os.environ.get("SPACE_HOST", "").replace(",", " ").split()  # under which the Hub serves the page
    serve({models}, PICTURES, host, trusted_hosts=names)
'''


def requirements(setup: Path) -> list[str]:
    """The requirements of the page: those of the package and its extras `explain` and `demo`."""
    parser = configparser.ConfigParser()
    parser.read(setup)
    extras = parser["options.extras_require"]
    lines = f"{parser['options']['install_requires']}\n{extras['explain']}\n{extras['demo']}".split()
    return [line for line in lines if not line.startswith("vitae-hf")]


def card(model: str, on_hub: bool) -> str:
    """The README of the Space."""
    settings = {
        "colorFrom": "purple",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": gradio.__version__,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        **({"models": [model], "preload_from_hub": [model]} if on_hub else {}),
    }
    text = (
        f"Shows what {model} sees in a picture, and what a classifier looks at: attention, Grad-CAM, and how much\n"
        "attention and convolutions add in each cell. The licence above is that of the code.\n"
    )
    return space_card(model, settings, "Attention and convolutions of ViTAE, cell by cell", "explainability", text)


def build(model: str, output: Path) -> None:
    """Write the folder of the Space.

    Raises:
        ValueError: `model` is neither a folder with a model for the page nor a Hub name, or `output` is not empty.
    """
    Models([model])  # raises the error about the name
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty")
    package, folder = Path(vitae_hf.__file__).parent, Path(find_model(model))
    shutil.copytree(package, output / "vitae_hf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "LICENSE", output)
    on_hub = not folder.is_dir()
    if not on_hub:
        (output / "models" / folder.resolve().name).mkdir(parents=True)
        for path in [path for pattern in MODEL_FILES for path in folder.glob(pattern)]:
            shutil.copy(path, output / "models" / folder.resolve().name)
    models = f"Models([{model!r}])" if on_hub else 'Models(root=Path("models"))'
    (output / "app.py").write_text(APP.format(models=models), encoding="utf-8")
    (output / "requirements.txt").write_text("\n".join(requirements(REPOSITORY / "setup.cfg")) + "\n", encoding="utf-8")
    (output / "README.md").write_text(card(model if on_hub else folder.resolve().name, on_hub), encoding="utf-8")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub name, or folder of a model, which is copied into the Space")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    build(arguments.model, arguments.output)
    return {
        "output": str(arguments.output),
        "model": arguments.model,
        "files": sum(path.is_file() for path in arguments.output.rglob("*")),
        "bytes": size_of(arguments.output),
        **environment(),
    }


if __name__ == "__main__":
    run_command(main)
