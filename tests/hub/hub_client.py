"""Run by test_hub.py in processes of its own: does what it is told, with the real client, one JSON line after another.

    {"command": "push", "arguments": […], "token": …}         -> {"status", "stdout", "stderr"}
    {"library": "org/name", "folder": …, "token": …}                -> {}; pushed by model and Trainer (`…-trainer`)
    {"find": "org/name", "task": …, "image": …}                     -> {"found"}: objects, of their masks the CRC
    {"load": "org/name", "revision": …, "image": …, "output": …}    -> {}; tensors in the file `output`

Works without vitae_hf, by `trust_remote_code`, where it is not installed.
"""

import importlib
import importlib.util
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from zlib import crc32

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


HAS_PACKAGE = importlib.util.find_spec("vitae_hf") is not None


def run_command_line(command: str, arguments: list[str], token: str | None) -> dict:
    from vitae_hf.failures import run_command

    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            run_command(importlib.import_module(f"vitae_hf.commands.{command}").main, arguments)
        except SystemExit as stop:
            status = stop.code
    return {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def load(name: str, revision: str | None, image: str, output: str) -> dict:
    if HAS_PACKAGE:
        import vitae_hf  # noqa: F401
    options = {"revision": revision, **({} if HAS_PACKAGE else {"trust_remote_code": True})}
    classify = pipeline("image-classification", model=name, **options)  # first: it must not ask anything
    record = {"pipeline": classify(image, top_k=1)[0]["label"]}
    record["model_type"] = AutoConfig.from_pretrained(name, **options).model_type
    inputs = AutoImageProcessor.from_pretrained(name, **options)(image, return_tensors="pt")
    model = AutoModelForImageClassification.from_pretrained(name, **options).eval()
    with torch.no_grad():
        record["logits"] = model(**inputs).logits
        record["pooled"] = AutoModel.from_pretrained(name, **options).eval()(**inputs).pooler_output
    record["module"] = type(model).__module__
    torch.save(record, output)
    return {}


def find(name: str, task: str, image: str) -> dict:
    import vitae_hf  # noqa: F401

    ask = pipeline(task, model=name)
    has_instances = hasattr(ask.image_processor, "post_process_instance_segmentation")
    found = ask(image, threshold=0.0, **({"subtask": "instance"} if has_instances else {}))
    return {"found": [{**one, "mask": crc32(one["mask"].tobytes()) if "mask" in one else None} for one in found]}


def push_with_the_library(name: str, folder: str, token: str) -> dict:
    from transformers import Trainer, TrainingArguments

    import vitae_hf

    os.environ["HF_TOKEN"] = token
    model = vitae_hf.ViTAEForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    model.push_to_hub(name)
    processor.push_to_hub(name)
    options = {"max_steps": 1, "report_to": "none", "push_to_hub": True, "hub_model_id": f"{name}-trainer"}
    arguments = TrainingArguments(f"{folder}-trained", learning_rate=0.0, **options)
    data = [{"pixel_values": torch.zeros(3, 64, 64), "labels": 0}] * 2
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        task = json.loads(line)
        if "command" in task:
            answer = run_command_line(task["command"], task["arguments"], task["token"])
        elif "library" in task:
            with redirect_stdout(sys.stderr):
                answer = push_with_the_library(task["library"], task["folder"], task["token"])
        elif "find" in task:
            answer = find(task["find"], task["task"], task["image"])
        else:
            answer = load(task["load"], task["revision"], task["image"], task["output"])
        print(json.dumps(answer), flush=True)
