# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What `measure_gpu.py` measures, part by part. Each part is a generator, which yields a row when it has measured it.

Nothing here needs `datasets`, `evaluate` or the internet. A row with an `error` in place of its figures says what could
not be measured, and the others of its part are measured nevertheless.
"""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import measure_parity
import measure_step
import numpy as np
import PIL.Image
import pyarrow.parquet
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageClassification

from vitae_hf import PRESETS, ViTAEImageProcessor, config_from_preset
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, soft_target_loss, training_transform
from vitae_hf.data.samples import ImageDataset, collate, evaluation_pixels
from vitae_hf.deployment.benchmarking import (
    Setup,
    Workload,
    error_in_a_line,
    interleave,
    loading_images_per_s,
    measure_speed,
    seconds_per_call,
    set_precision,
)
from vitae_hf.files import ASSETS
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.curves import draw_curves
from vitae_hf.training.trainer import ViTAETrainer


DATA = Path(__file__).parents[1] / "examples" / "fashion_mnist_mini"


@dataclass(frozen=True)
class Plan:
    """Which networks are measured, and how long.

    Args:
        device: the torch device.
        golden: variants whose logits are compared with the golden data.
        plain: variants whose step of training is compared with that of the plain networks of the tests.
        goals: presets that the first compiled group and the profile have.
        others: presets and networks that are measured beside them.
        reference: the network that efficiencies are relative to.
        image_size: height and width in pixels.
        batch_size: of training and of the larger inference.
        rounds, seconds: how many turns each network has, and how long one takes at least.
        backend: what `torch.compile` compiles with in training.
        prepared_and_compiled: whether inference is also measured compiled.
        attention: backends of softmax attention.
        loaders: numbers of loader workers to try.
        short_run: preset, side of the images in pixels, epochs and images of the run on Fashion-MNIST.
    """

    device: str = "cuda"
    golden: tuple[str, ...] = ("vitae-t", "vitae-s", "vitae-b", "vitae-b-rvsa", "vitaev2-s")
    plain: tuple[str, ...] = ("vitae-t", "vitae-s", "vitaev2-s")
    goals: tuple[str, ...] = ("vitae-s", "vitaev2-s")
    others: tuple[str, ...] = ("vitae-t", "vitae-b", "swin-t", "convnext-t")
    reference: str = "vit-s"
    image_size: tuple[int, int] = (224, 224)
    batch_size: int = 128
    rounds: int = 3
    seconds: float = 0.4
    backend: str = "inductor"
    prepared_and_compiled: bool = True
    attention: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
    loaders: tuple[int, ...] = (1, 8, 16)
    short_run: tuple[str, int, float, int | None] = ("vitae-t", 112, 6, None)

    @property
    def networks(self) -> tuple[str, ...]:
        return (self.reference, *self.goals, *self.others)

    @property
    def training(self) -> Setup:
        """What all setups of training share; the network is the reference."""
        return Setup(
            self.reference,
            self.image_size,
            self.batch_size,
            mode="training",
            dtype="autocast",
            device=self.device,
            channels_last=True,  # as `ViTAETrainer` trains
            backend=self.backend,
        )

    @property
    def inference(self) -> Setup:
        """What all setups of inference share; the network is the reference."""
        return Setup(self.reference, self.image_size, self.batch_size, dtype="bfloat16", device=self.device)

    def compiled(self, network: str) -> list[Setup]:
        """Everything of a network that is measured compiled."""
        setups = [replace(self.training, network=network, compiled=True)]
        if self.prepared_and_compiled:
            prepared = replace(self.inference, network=network, compiled=True, prepared=network in PRESETS)
            setups += [prepared, replace(prepared, batch_size=1)]
        return setups


MINIATURE = Plan(
    device="cpu",
    golden=("vitae-t",),
    plain=("vitae-t",),
    goals=("vitae-nano",),
    others=(),
    reference="timm:test_vit",
    image_size=(32, 32),
    batch_size=4,
    rounds=1,
    seconds=0.01,
    backend="aot_eager",
    prepared_and_compiled=False,
    attention=("eager", "sdpa", "flash_attention_2"),
    loaders=(0,),
    short_run=("vitae-nano", 32, 1, 100),
)
"""The same on a CPU in less than a minute, to see that every part works."""


def parity(plan: Plan) -> Iterator[dict]:
    """Distance from the authors' logits, in float32 (without TF32) and in half precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in plan.golden:
        for dtype, errors in measure_parity.measure(name, plan.device).items():
            yield {"network": name, "dtype": dtype, **errors}


@torch.no_grad()
def attention(plan: Plan) -> Iterator[dict]:
    """The backends of softmax attention in bfloat16: distance of the logits from eager attention's, and speed."""
    pixels = torch.randn(min(plan.batch_size, 32), 3, *plan.image_size, device=plan.device, dtype=torch.bfloat16)
    for network in plan.goals:
        model = AutoModelForImageClassification.from_config(config_from_preset(network))
        model = model.to(plan.device, torch.bfloat16).eval()
        model.set_attn_implementation("eager")
        expected = model(pixels).logits.float()
        for name in plan.attention:
            row = {"network": network, "attention": name}
            try:
                model.set_attn_implementation(name)
                difference = (model(pixels).logits.float() - expected).abs().max() / expected.std()
                seconds = seconds_per_call(partial(model, pixels), 5, plan.device)
                yield {**row, "max_over_std": difference.item(), "images_per_s": len(pixels) / seconds}
            except Exception as error:  # a package that is not installed, or a backend that lacks a kernel
                yield {**row, "error": error_in_a_line(error)}


def one_process(plan: Plan) -> Iterator[dict]:
    """DistributedDataParallel and SyncBatchNorm with one process give the loss of the plain model, at what speed?"""
    is_gpu = torch.device(plan.device).type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if is_gpu else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        kinds = {"plain": nn.Identity(), "DDP": nn.parallel.DistributedDataParallel}
        if is_gpu:  # torch has no SyncBatchNorm for CPUs
            kinds["DDP and SyncBatchNorm"] = lambda model: kinds["DDP"](nn.SyncBatchNorm.convert_sync_batchnorm(model))
        expected = None
        for network, (kind, wrap) in product(plan.goals, kinds.items()):
            workload = Workload(replace(plan.training, network=network))
            workload.model.eval()  # no drop path: the same loss each time
            for norm in workload.model.modules():
                norm.train(isinstance(norm, nn.BatchNorm2d))
            workload.run = wrap(workload.model)
            loss = workload.loss().item()
            expected = loss if kind == "plain" else expected
            seconds = seconds_per_call(workload, 3, plan.device)
            speed = plan.batch_size / seconds
            yield {"network": network, "kind": kind, "loss_minus_plain": loss - expected, "images_per_s": speed}
    finally:
        torch.distributed.destroy_process_group()


def compile_in_background(plan: Plan) -> dict[str, subprocess.Popen]:
    """Processes that compile each network, so that torch's cache on disk has the code when it is measured."""
    command = [sys.executable, str(Path(__file__).with_name("measure_gpu.py")), "--compile"]
    share = max(1, (os.cpu_count() or 1) // len(plan.networks))
    variables = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(share), "OMP_NUM_THREADS": str(share)}
    return {
        network: subprocess.Popen(
            [*command, json.dumps([asdict(setup) for setup in plan.compiled(network)])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        )
        for network in plan.networks
    }


def compile_setups(setups: list[dict]) -> None:
    """Run each setup once and print a row for it: what the processes of [`compile_in_background`] do."""
    for fields in setups:
        setup = Setup(**{**fields, "image_size": tuple(fields["image_size"])})
        row = {"network": setup.network, "mode": setup.mode, "batch_size": setup.batch_size}
        set_precision(setup.dtype)
        started = time.perf_counter()
        try:
            Workload(setup)()
            row["first_call_seconds"] = time.perf_counter() - started
        except Exception as error:
            row["error"] = error_in_a_line(error)
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()


def compiling(plan: Plan, processes: dict[str, subprocess.Popen]) -> Iterator[dict]:
    """How long the first call of a compiled network takes while the others are compiled beside it."""
    try:
        for network, process in processes.items():
            rows = [json.loads(line) for line in process.communicate()[0].splitlines()]
            yield from rows or [{"network": network, "error": f"exit status {process.returncode}"}]
    finally:
        for process in processes.values():
            process.kill()  # those that were not done when the part's time was up


def speeds(setups: list[Setup], plan: Plan) -> Iterator[dict]:
    yield from measure_speed(setups, plan.reference, plan.rounds, plan.seconds)
    torch.cuda.empty_cache()


def training(plan: Plan) -> Iterator[dict]:
    """Steps of training under bfloat16 autocast: as loaded, with merged groups, and with gradient checkpointing."""
    merged = [replace(plan.training, network=network, merged=True) for network in plan.goals]
    for checkpointing, more in ((False, merged), (True, [])):
        shared = replace(plan.training, checkpointing=checkpointing)
        yield from speeds([*(replace(shared, network=network) for network in plan.networks), *more], plan)


def training_compiled(plan: Plan) -> Iterator[dict]:
    """The same, compiled: the networks with goals first."""
    shared = replace(plan.training, compiled=True)
    for networks in filter(None, (plan.goals, plan.others)):
        yield from speeds([replace(shared, network=network) for network in (plan.reference, *networks)], plan)


def inference(plan: Plan) -> Iterator[dict]:
    """Inference in bfloat16, batch 1 and large, as loaded, prepared, and prepared and compiled."""
    for batch_size, compiled in product((plan.batch_size, 1), (False, True)[: 1 + plan.prepared_and_compiled]):
        shared = replace(plan.inference, batch_size=batch_size, compiled=compiled)
        setups = [replace(shared, network=name) for name in plan.networks if not (compiled and name in PRESETS)]
        setups += [replace(shared, network=name, prepared=True) for name in plan.networks if name in PRESETS]
        yield from speeds(setups, plan)


def plain_networks(plan: Plan) -> Iterator[dict]:
    """A step of training beside the same networks written out plainly, under bfloat16 autocast."""
    for network in plan.plain:
        step = measure_step.measure(network, 4, plan.rounds, plan.seconds, plan.device, autocast=True)
        yield {"network": network, "batch_size": 4, "times_as_fast": step["times_as_fast"]["median"]} | {
            f"{name}_ms": 1000 * seconds for name, seconds in step["seconds"].items()
        }


KINDS = {
    "communication": r"nccl",
    "attention": r"flash|fmha|attention|sdp",
    "layout and copies": r"copy|memcpy|memset|transpose|nchw|nhwc|permute|cat(_|$|array)|contiguous|clone|convert",
    "convolution": r"conv|wgrad|dgrad|fprop|cudnn.*implicit",
    "matrix product": r"gemm|cutlass|xmma|nvjet|matmul|addmm|::mm|bmm|linear|gemv|splitk",
    "normalisation": r"norm|bn_",
    "optimizer": r"adam|multi_tensor|foreach",
    "reduction": r"reduce|sum|mean|amax|softmax",
    "elementwise": r"elementwise|vectorized|gelu|silu|exp|add|mul|div|triton|fill|dropout|bernoulli",
}
"""Kinds of kernels (on a CPU: of operations) by what their names have; the first that fits counts."""


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel.lower())), "other")


def kernels(plan: Plan) -> Iterator[dict]:
    """Where the time of a training step goes, by kind of kernel, and the eight longest kernels."""
    is_gpu = torch.device(plan.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    for network in plan.goals:
        workload = Workload(replace(plan.training, network=network))
        workload()
        steps = 3
        with profile(activities=activities) as profiler:
            seconds = seconds_per_call(workload, steps, plan.device)
        times = Counter()
        for event in profiler.key_averages():
            if (event.device_type.name == "CUDA") == is_gpu and not event.is_user_annotation:
                total = event.self_device_time_total if is_gpu else event.self_cpu_time_total
                times[event.key] += total / 1000 / steps  # microseconds of all steps
        by_kind = Counter()
        for kernel, milliseconds in times.items():
            by_kind[kind_of(kernel)] += milliseconds
        whole = sum(times.values())
        for kind, milliseconds in by_kind.most_common():
            yield {"network": network, "kind": kind, "ms": milliseconds, "share": milliseconds / whole}
        for kernel, milliseconds in times.most_common(8):
            yield {"network": network, "kind": kind_of(kernel), "kernel": kernel[:120], "ms": milliseconds}
        yield {"network": network, "kind": "whole step, by the clock", "ms": 1000 * seconds}


def input_path(plan: Plan) -> Iterator[dict]:
    """Images a second that loader workers prepare, and that the device normalises, erases and mixes."""
    picture = PIL.Image.open(ASSETS / "chelsea.png").convert("RGB").resize((500, 375))  # ImageNet's usual size
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=90)
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "label": 0}] * 1000
    arguments = AugmentationArguments()
    dataset = ImageDataset(rows, training_transform(plan.image_size, arguments), seed=0)
    for workers in plan.loaders:
        speed = loading_images_per_s(dataset, workers, min(plan.batch_size, 64), 10 * plan.seconds)
        yield {"step": f"read, decode, augment: {workers} workers", "images_per_s": speed}
    augment = DeviceAugmentation(1000, arguments)
    pixels = torch.zeros(plan.batch_size, 3, *plan.image_size, dtype=torch.uint8)
    pixels = pixels.pin_memory() if plan.device != "cpu" else pixels
    labels = torch.zeros(plan.batch_size, dtype=torch.long, device=plan.device)
    functions = {
        "copy to the device": lambda: pixels.to(plan.device, non_blocking=True),
        "copy, normalise, erase, mix": lambda: augment(pixels.to(plan.device, non_blocking=True), labels),
    }
    seconds, errors = interleave(functions, plan.rounds, plan.seconds, plan.device)
    for step, times in seconds.items():
        yield {"step": step, "images_per_s": plan.batch_size / np.median(times)}
    yield from ({"step": step, "error": error} for step, error in errors.items())


def fashion_mnist(plan: Plan, picture: Path) -> Iterator[dict]:
    """A short run of `ViTAETrainer` on the example data, from random weights: does training learn here?"""
    preset, side, epochs, count = plan.short_run
    splits = {
        name: pyarrow.parquet.read_table(DATA / f"{name}-00000-of-00001.parquet").to_pylist()[:count]
        for name in ("train", "test")
    }
    augmentation = AugmentationArguments(auto_augment=None, min_crop_scale=0.5, mixup_alpha=0, cutmix_alpha=0)
    processor = ViTAEImageProcessor(size=side, crop_pct=1.0)
    with TemporaryDirectory() as folder:
        arguments = ViTAETrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            weight_decay=0.05,
            warmup_steps=0.1,
            eval_strategy="epoch",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=min(8, max(plan.loaders)),
            use_cpu=plan.device == "cpu",
        )
        trainer = ViTAETrainer(
            AutoModelForImageClassification.from_config(
                config_from_preset(preset, image_size=side, num_labels=10, drop_path_rate=0.0)
            ),
            arguments,
            data_collator=collate,
            train_dataset=ImageDataset(splits["train"], training_transform(side, augmentation), seed=0),
            eval_dataset=ImageDataset(splits["test"], partial(evaluation_pixels, processor)),
            compute_loss_func=soft_target_loss,
            compute_metrics=lambda found: {
                "top1": 100 * float((found.predictions.argmax(1) == found.label_ids).mean())
            },
            augmentation=DeviceAugmentation(10, augmentation),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    draw_curves(trainer.state.log_history, picture, ("top1",))
    for entry in trainer.state.log_history:
        if "eval_top1" in entry:
            row = {"network": preset, "size": side, "train_images": len(splits["train"]), "epoch": entry["epoch"]}
            yield {**row, "top1_percent": entry["eval_top1"], "eval_loss": entry["eval_loss"]}
    yield {"network": preset, "seconds": seconds}
