"""Importing the package registers it, twice if need be, and adds next to nothing to importing the Auto classes."""

import importlib
import subprocess
import sys

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import vitae_hf


def test_everything_is_registered_and_importing_twice_is_fine():
    importlib.reload(vitae_hf)
    config = AutoConfig.for_model("vitae", depths=(0, 0, 1))
    assert type(config) is vitae_hf.ViTAEConfig
    assert type(AutoModel.from_config(config)) is vitae_hf.ViTAEModel
    assert type(AutoModelForImageClassification.from_config(config)) is vitae_hf.ViTAEForImageClassification


def test_every_public_name_exists_and_has_a_docstring():
    for name in vitae_hf.__all__:
        public = getattr(vitae_hf, name)
        assert public.__doc__ or not callable(public), name


def test_importing_it_loads_nothing_heavy_beyond_the_auto_classes_and_prints_nothing():
    baseline = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, "
    baseline += "PreTrainedModel; import transformers.image_processing_backends, transformers.modeling_layers"
    program = f"import sys; {baseline}; before = set(sys.modules); import time; start = time.perf_counter()\n"
    program += "import vitae_hf; seconds = time.perf_counter() - start\n"
    program += "print(seconds, *sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, *packages = done.stdout.split()
    heavy = {"accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy", "timm", "torchvision"}
    assert not heavy & set(packages)
    assert float(seconds) < 1.0
    assert len(done.stdout.splitlines()) == 1
