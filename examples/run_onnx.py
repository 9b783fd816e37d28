"""Classify a picture without torch and transformers: `python examples/run_onnx.py FOLDER PICTURE`.

FOLDER is a model's, after `vitae export FOLDER --format onnx`. Preprocessing is the image processor's, for
8-bit pictures up to 20 times as long as wide.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


folder, picture = sys.argv[1:]
config, prep = (json.load(open(f"{folder}/{name}.json")) for name in ("config", "preprocessor_config"))
size = prep["size"]["width"], prep["size"]["height"]
image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
cover = [int(side / prep["crop_pct"]) for side in size]  # what the resized picture covers; then its middle is cut out
cover = [max(cover[i], int(cover[1 - i] * image.size[i] / image.size[1 - i])) for i in (0, 1)]
left, top = (int(round((long - short) / 2)) for long, short in zip(cover, size))
image = image.resize(cover, prep["resample"]).crop((left, top, left + size[0], top + size[1]))
pixels = ((np.asarray(image) / 255 - prep["image_mean"]) / prep["image_std"]).transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
logits = session.run(["logits"], {"pixel_values": pixels.astype(np.float32)})[0][0]
scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
if config.get("problem_type") == "multi_label_classification":  # each label by itself
    scores = 1 / (1 + np.exp(-logits))
print(f"{config['id2label'][str(scores.argmax())]}: {scores.max():.4f}")
