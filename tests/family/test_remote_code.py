"""Saved folders work where the package is not installed, with and without torchvision."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    IMAGE,
    autoencoder_weights,
    class_token_config,
    original_weights,
    pyramid_config,
    python_path_without,
    rotated_config,
    windowed_config,
)
from packaging import version
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForSemanticSegmentation,
)

import vitae_hf
from vitae_hf import (
    ViTAEBackbone,
    ViTAEConfig,
    ViTAEForImageClassification,
    ViTAEForMaskedImageModeling,
    ViTAEForPreTraining,
    ViTAEImageProcessor,
    ViTAEImageProcessorPil,
    ViTAEModel,
    ViTAEv2ForImageClassification,
    ViTAEv2ForMaskedImageModeling,
    config_from_preset,
    heads_vitae,
)
from vitae_hf.heads_vitae import DPTConfig, DPTForDepthEstimation, UperNetConfig, UperNetForSemanticSegmentation
from vitae_hf.hub.conversion import convert_checkpoint


SHARED_CODE = {
    "attention_vitae.py",
    "configuration_vitae.py",
    "image_processing_vitae.py",
    "layers_vitae.py",
    "modeling_base_vitae.py",
}
CODE_FILES = SHARED_CODE | {"decoder_vitae.py", "embeddings_vitae.py", "modeling_vitae.py", "rotated_windows_vitae.py"}
RCNN_FILES = {f"{part}_rcnn_vitae.py" for part in ("configuration", "image_processing", "modeling")}  # tests/dense
CODE_FILES_V2 = SHARED_CODE | {"configuration_vitaev2.py", "modeling_vitaev2.py"}
CODE_FILES_HEADS = (CODE_FILES | CODE_FILES_V2 | {"heads_vitae.py"}) - {"image_processing_vitae.py"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Classifiers of every kind, a base model, a backbone and networks pretrained without labels, some converted."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("remote") / "folders"
    models = {
        "base": ViTAEModel(pyramid_config()),
        "classifier": ViTAEForImageClassification(pyramid_config()),
        "class_token": ViTAEForImageClassification(class_token_config()),
        "rotated": ViTAEForImageClassification(rotated_config()),
        "rotated_backbone": ViTAEBackbone(rotated_config(rescaled_cells=(0, 1, 1, 1))),
        "windowed": ViTAEv2ForImageClassification(windowed_config()),
        "autoencoder": ViTAEForPreTraining(class_token_config(conv_kernel_size=1)),
        "masked": ViTAEForMaskedImageModeling(pyramid_config()),
        "masked_windowed": ViTAEv2ForMaskedImageModeling(windowed_config()),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        ViTAEImageProcessor(size=64).save_pretrained(root / name)
    # As where windows of 3 are padded at the end, which changes the maps of 16 and 8 tokens a side.
    unread = {"norm0.weight": torch.ones(16), "layers.0.RC.attn.attn.relative_position_bias_table": torch.ones(25, 1)}
    files = {
        "converted_backbone": {**original_weights(config_from_preset("vitaev2-nano")), **unread},
        "converted_autoencoder": autoencoder_weights(config_from_preset("vitae-nano-mae", conv_kernel_size=1)),
    }
    for name, weights in files.items():
        torch.save({f"backbone.{key}": value for key, value in weights.items()}, root.with_name(f"{name}.pth"))
        convert_checkpoint(root.with_name(f"{name}.pth"), root / name, head="drop")
    return root


@pytest.fixture(scope="module")
def heads(folders):
    """Heads of the library on backbones of both families; the last is the library's own class."""
    root = folders.with_name("heads")
    tokens = {"cell_stages": True, "reshape_hidden_states": False, "out_indices": [1, 2]}
    sizes = {"neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8}
    models = {
        "depth": (DPTForDepthEstimation, DPTConfig(backbone_config=class_token_config(**tokens), **sizes)),
        "segmenter": (
            UperNetForSemanticSegmentation,
            UperNetConfig(backbone_config=windowed_config(), hidden_size=8, use_auxiliary_head=False),
        ),
        "without_code": (
            transformers.DPTForDepthEstimation,
            transformers.DPTConfig(backbone_config=class_token_config(**tokens), **sizes),
        ),
    }
    for name, (model_class, config) in models.items():
        model_class(config).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    "torchvision",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["with_torchvision", "without_torchvision"],
)
def test_folders_load_without_the_package_and_give_the_same_bits(folders, heads, tmp_path, torchvision):
    if not torchvision and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("this AutoImageProcessor needs torchvision whatever the processor")
    hidden = ("vitae_hf", "__editable__") if torchvision else ("vitae_hf", "__editable__", "torchvision")
    path = python_path_without(*hidden, folder=tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-S",
        Path(__file__).with_name("without_package.py"),
        folders,
        heads,
        IMAGE,
        tmp_path / "out.pt",
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = torch.load(tmp_path / "out.pt")
    assert record["torchvision"] == torchvision
    processor_class = ViTAEImageProcessor if torchvision else ViTAEImageProcessorPil
    inputs = processor_class(size=64)(IMAGE, return_tensors="pt")
    with torch.no_grad():
        for folder in folders.iterdir():
            assert record["processor"][folder.name][0] == processor_class.__name__
            assert torch.equal(record["processor"][folder.name][1], inputs.pixel_values)
            if folder.name in record["maps"]:
                maps = ViTAEBackbone.from_pretrained(folder).eval()(**inputs).feature_maps
                assert all(map(torch.equal, record["maps"][folder.name], maps)) and len(maps) == 4
                continue
            base = AutoModel.from_pretrained(folder).eval()
            assert torch.equal(record["pooled"][folder.name], base(**inputs).pooler_output)
            if folder.name in record["predicted"]:  # masked autoencoders, the base model of which has 3×3 kernels
                model = ViTAEForPreTraining.from_pretrained(folder)
                noise = torch.arange((model.config.image_size / model.config.patch_size) ** 2)[None]
                assert torch.equal(record["predicted"][folder.name], model(**inputs, noise=noise).logits)
            elif folder.name in record["reconstructed"]:
                model = AutoModelForMaskedImageModeling.from_pretrained(folder).eval()
                masked = torch.arange(16 * 16)[None] < 100
                outputs = model(**inputs, bool_masked_pos=masked)
                assert torch.equal(record["reconstructed"][folder.name], outputs.reconstruction)
            elif folder.name in record["logits"]:
                model = AutoModelForImageClassification.from_pretrained(folder).eval()
                assert torch.equal(record["logits"][folder.name], model(**inputs).logits)
    assert set(record["predicted"]) == {"autoencoder", "converted_autoencoder"} and len(record["logits"]) == 4
    assert set(record["maps"]) == {"rotated_backbone"}
    assert set(record["reconstructed"]) == {"masked", "masked_windowed"}
    assert AutoModel.from_pretrained(folders / "converted_backbone").config.window_padding == "end"
    assert CODE_FILES_V2 | {"config.json", "model.safetensors", "preprocessor_config.json"} == set(record["again"])
    assert torch.equal(record["pooled_again"], record["pooled"]["windowed"])
    for name, auto_class in (("depth", AutoModelForDepthEstimation), ("segmenter", AutoModelForSemanticSegmentation)):
        head = auto_class.from_pretrained(heads / name).eval()
        assert type(head).__module__.startswith("transformers.")  # with the package, no code of the folder runs
        with torch.no_grad():
            torch.testing.assert_close(record["heads"][name], head(**inputs)[0])
    assert record["head_again"] == sorted(CODE_FILES_HEADS | {"config.json", "model.safetensors"})
    assert record["without_code"] == "KeyError('vitae')"


def test_all_auto_classes_are_in_the_folder_whichever_class_was_saved(folders, tmp_path):
    ViTAEConfig().save_pretrained(tmp_path / "config_only")
    for folder in [*folders.iterdir(), tmp_path / "config_only"]:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        names = {"Backbone", "Config", "Model", "ModelForImageClassification", "ModelForMaskedImageModeling"}
        is_v2 = folder.name in ("windowed", "masked_windowed", "converted_backbone")
        names |= set() if is_v2 else {"ModelForPreTraining"}
        assert set(auto_map) == {f"Auto{name}" for name in names}
        for reference in auto_map.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (folder / f"{module}.py").read_text()
    processor = json.loads((folders / "base" / "preprocessor_config.json").read_text())
    assert set(processor["auto_map"]["AutoImageProcessor"]) == {"torchvision", "pil"}
    assert processor["image_processor_type"] == "ViTAEImageProcessor"


def test_the_code_files_import_nothing_but_what_every_user_has(folders, heads):
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    allowed = {"huggingface_hub", "numpy", "PIL", "torch", "transformers"} | set(sys.stdlib_module_names)
    root = {path.name for path in Path(vitae_hf.__file__).parent.glob("*.py")}
    family = {name for name in root if name.endswith(("_vitae.py", "_vitaev2.py"))}
    assert family == CODE_FILES | CODE_FILES_V2 | CODE_FILES_HEADS | RCNN_FILES
    saved = {folders / "classifier": CODE_FILES, folders / "windowed": CODE_FILES_V2, heads / "depth": CODE_FILES_HEADS}
    for folder, code_files in saved.items():
        assert {path.name for path in folder.glob("*.py")} == code_files
        for path in folder.glob("*.py"):
            assert set(get_imports(path)) <= allowed, path
            assert {f"{module}.py" for module in get_relative_imports(path)} <= code_files, path


def test_what_is_no_head_of_the_library_is_named():
    with pytest.raises(AttributeError, match="'DPTForDepth' is no network of transformers and no configuration of one"):
        _ = heads_vitae.DPTForDepth
    assert heads_vitae.GroundingDinoForObjectDetection._auto_class == "AutoModelForZeroShotObjectDetection"
    assert heads_vitae.DPTConfig is DPTConfig and not transformers.DPTConfig._auto_class  # the library's is unchanged


OWN_CODE = """
import torch
import vitae_hf

class TwoHeads(vitae_hf.ViTAEPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.vitae = vitae_hf.ViTAEModel(config)
        self.colour = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        return self.colour(self.vitae(pixel_values).pooler_output)

class Louder(vitae_hf.ViTAEForImageClassification):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 10 * outputs.logits
        return outputs

class Unregistered(Louder):
    pass

class OwnProcessor(vitae_hf.ViTAEImageProcessor):
    pass

TwoHeads.register_for_auto_class("AutoModel")
Louder.register_for_auto_class("AutoModelForImageClassification")
OwnProcessor.register_for_auto_class("AutoImageProcessor")
"""


def test_a_users_class_that_is_registered_is_saved_with_its_code_and_loads_as_itself(tmp_path, monkeypatch):
    (tmp_path / "own_code_of_a_test.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_code_of_a_test")
    config, pixels = pyramid_config(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for model_class, auto_class in ((own.TwoHeads, AutoModel), (own.Louder, AutoModelForImageClassification)):
        model, folder = model_class(config).eval(), tmp_path / model_class.__name__
        model.save_pretrained(folder)
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(loaded).__name__ == model_class.__name__
        expected, found = (getattr(net(pixels), "logits", net(pixels)) for net in (model, loaded))
        assert torch.equal(expected, found)
    own.OwnProcessor().save_pretrained(folder)
    assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "OwnProcessor"
    # What a configuration says of an earlier folder is not said of the next, nor is a subclass registered by its base.
    for model_class in (ViTAEForImageClassification, own.Unregistered):
        model_class(loaded.config).save_pretrained(tmp_path / "next")
        auto_map = json.loads((tmp_path / "next" / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForImageClassification"] == "modeling_vitae.ViTAEForImageClassification"
        assert not (tmp_path / "next" / "own_code_of_a_test.py").exists()
