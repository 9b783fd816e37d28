"""Run by test_remote_code.py in a process that cannot import vitae_hf: what the Auto classes make of saved folders.

python -S without_package.py FOLDER_OF_FOLDERS FOLDER_OF_HEADS IMAGE OUTPUT.pt
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


assert importlib.util.find_spec("vitae_hf") is None
folders, heads, image, output = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
record = {
    "torchvision": importlib.util.find_spec("torchvision") is not None,
    "processor": {},
    "pooled": {},
    "logits": {},
    "predicted": {},
    "reconstructed": {},
    "maps": {},
    "heads": {},
}
try:  # before a folder with code has made the backbones known
    AutoModelForDepthEstimation.from_pretrained(heads / "without_code")
except Exception as error:
    record["without_code"] = repr(error)
for folder in sorted(folders.iterdir()):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type in ("vitae", "vitaev2")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(image, return_tensors="pt")
    record["processor"][folder.name] = (type(processor).__name__, inputs.pixel_values)
    with torch.no_grad():
        if config.architectures[0].endswith("Backbone"):  # `AutoBackbone` takes a folder for a network of timm
            backbone_class = get_class_from_dynamic_module(config.auto_map["AutoBackbone"], folder)
            record["maps"][folder.name] = backbone_class.from_pretrained(folder).eval()(**inputs).feature_maps
            continue
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        record["pooled"][folder.name] = base(**inputs).pooler_output
        if config.architectures[0].endswith("ForPreTraining"):
            autoencoder = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
            noise = torch.arange((config.image_size / config.patch_size) ** 2)[None]
            record["predicted"][folder.name] = autoencoder(**inputs, noise=noise).logits
        elif config.architectures[0].endswith("ForMaskedImageModeling"):
            masked = AutoModelForMaskedImageModeling.from_pretrained(folder, trust_remote_code=True).eval()
            hidden = torch.arange((config.image_size // config.patch_size) ** 2)[None] < 100
            record["reconstructed"][folder.name] = masked(**inputs, bool_masked_pos=hidden).reconstruction
        elif config.architectures[0].endswith("ForImageClassification"):
            model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
            record["logits"][folder.name] = model(**inputs).logits
            top = pipeline("image-classification", model=str(folder), trust_remote_code=True)(image, top_k=1)
            assert top[0]["label"] == model.config.id2label[model(**inputs).logits.argmax().item()]

# What was loaded from a folder can be trained further and saved as whole a folder.
again = folders.parent / f"again-{record['torchvision']}"
model.save_pretrained(again)
processor.save_pretrained(again)
record["again"] = sorted(path.name for path in again.iterdir())
record["auto_map"] = AutoConfig.from_pretrained(again, trust_remote_code=True).auto_map
with torch.no_grad():
    reloaded = AutoModel.from_pretrained(again, trust_remote_code=True).eval()
    record["pooled_again"] = reloaded(**inputs).pooler_output

for name, auto_class in (("depth", AutoModelForDepthEstimation), ("segmenter", AutoModelForSemanticSegmentation)):
    head = auto_class.from_pretrained(heads / name, trust_remote_code=True).eval()
    with torch.no_grad():
        record["heads"][name] = head(**inputs)[0]
head.save_pretrained(again.with_name(f"{again.name}-head"))
record["head_again"] = sorted(path.name for path in again.with_name(f"{again.name}-head").iterdir())
torch.save(record, output)
