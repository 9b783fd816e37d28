# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Measures speed, work and memory of classifiers, ours and others', side by side.

No machine is equally fast at all times. Speeds are therefore measured in one process in which the networks take turns
(`interleave`), and compared as ratios. Every network has 1,000 classes and random weights, and gets random images that
are in memory.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    ConvNextForImageClassification,
    DeiTForImageClassification,
    ResNetForImageClassification,
    SwinForImageClassification,
    ViTForImageClassification,
)

from ..data.samples import ImageDataset, collate
from ..presets import PRESETS, config_from_preset
from ..training.merging import merge_groups
from .inference import prepare_for_inference


_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
OTHER_NETWORKS: dict[str, tuple[Any, dict[str, int]]] = {
    "vit-s": (ViTForImageClassification, _SMALL),
    "vit-b": (ViTForImageClassification, {}),
    "deit-s": (DeiTForImageClassification, _SMALL),
    "swin-t": (SwinForImageClassification, {}),  # 96 wide, depths 2, 2, 6, 2, windows of 7
    "convnext-t": (ConvNextForImageClassification, {}),
    "resnet-50": (ResNetForImageClassification, {}),
}
"""Networks of transformers: the class of the model, and the fields in which its configuration differs from the
defaults."""

PRECISIONS: dict[str, tuple[torch.dtype, bool, bool]] = {
    "float32": (torch.float32, False, False),
    "tf32": (torch.float32, False, True),  # for GPUs
    "bfloat16": (torch.bfloat16, False, False),
    "float16": (torch.float16, False, False),
    "autocast": (torch.float32, True, True),  # as `ViTAETrainer` trains on a GPU
}
"""The dtype of the weights, whether bfloat16 autocast is on, and whether matrix products may use TF32."""


@dataclass(frozen=True)
class Setup:
    """What is measured: a network, and how it is run.

    Args:
        network: a preset, one of `OTHER_NETWORKS`, or `timm:` and the name of a model of timm.
        image_size: height and width in pixels.
        batch_size: images in a batch.
        mode: `"inference"`, or `"training"`: forward, cross-entropy, backward and AdamW.
        dtype: one of `PRECISIONS`.
        device: the torch device.
        compiled: whether `torch.compile` compiles the network.
        checkpointing: whether training uses gradient checkpointing.
        channels_last: whether weights and images are stored channels last.
        prepared: whether `prepare_for_inference` prepares the network; for presets in inference only.
        merged: whether grouped convolutions merge groups where that is faster ([`merge_groups`]); for presets only.
        backend: what `torch.compile` compiles with, unless the network is prepared too.
    """

    network: str
    image_size: tuple[int, int] = (224, 224)
    batch_size: int = 1
    mode: str = "inference"
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool = False
    checkpointing: bool = False
    channels_last: bool = False
    prepared: bool = False
    merged: bool = False
    backend: str = "inductor"


def is_known(network: str) -> bool:
    """Whether [`build_network`] can build it."""
    if network.startswith("timm:"):
        import timm  # here and below, since only networks of timm need it

        return timm.is_model(network.removeprefix("timm:"))
    return network in PRESETS or network in OTHER_NETWORKS


def build_network(network: str, image_size: tuple[int, int]) -> nn.Module:
    """A classifier of 1,000 classes with random weights, made for images of this size.

    Args:
        network: as in [`Setup`].
        image_size: height and width in pixels.

    Raises:
        ValueError: there is no such network, or it cannot take this size.
        RuntimeError: timm does not know the name.
        ModuleNotFoundError: timm is not installed.
    """
    if network.startswith("timm:"):
        import timm

        try:
            return timm.create_model(network.removeprefix("timm:"), img_size=image_size)
        except TypeError:  # timm's convolutional networks take any size and have no `img_size`
            return timm.create_model(network.removeprefix("timm:"))
    if network in OTHER_NETWORKS:
        model_class, fields = OTHER_NETWORKS[network]
        return model_class(model_class.config_class(image_size=image_size, num_labels=1000, **fields))
    config = config_from_preset(network, image_size=image_size, num_labels=1000)
    return AutoModelForImageClassification.from_config(config)


@lru_cache
@torch.no_grad()
def count_work(network: str, image_size: tuple[int, int]) -> tuple[int, float]:
    """Count the parameters of a network, and the multiply-adds of its forward pass for one image, in 1e9.

    They are counted on the meta device. There attention is not fused into one operation, so that its products count.
    """
    with torch.device("meta"):
        model = build_network(network, image_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *image_size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


class Workload:
    """A network ready to run: each call is one forward pass or one step of training, always on the same images."""

    autocast: bool
    is_training: bool
    pixels: torch.Tensor
    labels: torch.Tensor
    optimizer: torch.optim.AdamW | None

    def __init__(self, setup: Setup):
        torch.manual_seed(0)
        dtype, self.autocast, _ = PRECISIONS[setup.dtype]
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        self.setup = setup
        self.is_training = setup.mode == "training"
        model: Any = build_network(setup.network, setup.image_size).to(setup.device, dtype).to(memory_format=layout)
        if setup.prepared:
            self.model: nn.Module = prepare_for_inference(model, compile=setup.compiled, merge_groups=setup.merged)
        else:
            self.model = model.train(self.is_training)
            if setup.merged:
                merge_groups(model)
        if setup.checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None) or model.set_grad_checkpointing
            enable()
        self.run: Callable[..., Any] = model
        if setup.compiled:
            # All networks of one class count towards the limit. Beyond it, torch would run them uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self.run = model if setup.prepared else torch.compile(model, dynamic=False, backend=setup.backend)
        pixels = torch.randn(setup.batch_size, 3, *setup.image_size, device=setup.device, dtype=dtype)
        self.pixels = pixels.contiguous(memory_format=layout)
        self.labels = torch.randint(0, 1000, (setup.batch_size,), device=setup.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True) if self.is_training else None

    def logits(self) -> torch.Tensor:
        device_type = torch.device(self.setup.device).type
        with torch.autocast(device_type, torch.bfloat16) if self.autocast else nullcontext():
            outputs = self.run(self.pixels)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.logits

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits().float(), self.labels)

    def __call__(self) -> None:
        if self.optimizer is None:
            with torch.no_grad():
                self.logits()
            return
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class MatrixProduct:
    """Each call multiplies two square matrices, of the size at which the device is fastest."""

    SIDES: ClassVar[dict[str, tuple[int, ...]]] = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, dtype: str, device: str):
        weight_dtype, autocast, _ = PRECISIONS[dtype]
        self.device = device
        self.dtype: torch.dtype = torch.bfloat16 if autocast else weight_dtype
        sides = self.SIDES["cpu" if torch.device(device).type == "cpu" else "cuda"]
        self.use(max(sides, key=self.operations_per_s))

    def use(self, side: int) -> None:
        self.side = side
        self.left, self.right = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))

    def operations_per_s(self, side: int) -> float:
        self.use(side)
        self()
        return self.operations / min(seconds_per_call(self, 1, self.device) for _ in range(3))

    @property
    def operations(self) -> int:
        """How many multiplications and additions a call takes."""
        return 2 * self.side**3

    def __call__(self) -> None:
        self.left @ self.right


def set_precision(dtype: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for one of `PRECISIONS`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = PRECISIONS[dtype][2]


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def seconds_per_call(function: Callable[[], None], calls: int, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def warm_up(function: Callable[[], None], least_seconds: float, device: str) -> int:
    """How many calls take at least `least_seconds`. Two calls come before, since the first ones may be slower."""
    seconds_per_call(function, 2, device)
    return max(1, math.ceil(least_seconds / seconds_per_call(function, 1, device)))


def interleave(
    functions: dict[Any, Callable[[], None]], rounds: int, least_seconds: float, device: str
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """Time functions that take turns. In each round, every function is called for at least `least_seconds`.

    Returns:
        For each function that did not fail, by its key, the seconds per call in each round; and for each that failed,
        its error.
    """
    calls: dict[Any, int] = {}
    seconds: dict[Any, list[float]] = {key: [] for key in functions}
    errors: dict[Any, str] = {}
    for round_idx in range(-1, rounds):
        for key, function in functions.items():
            if key in errors:
                continue
            try:
                if round_idx < 0:
                    calls[key] = warm_up(function, least_seconds, device)
                else:
                    seconds[key].append(seconds_per_call(function, calls[key], device))
            except Exception as error:  # such as a lack of memory; the other functions are still timed
                errors[key] = error_in_a_line(error)
    return {key: times for key, times in seconds.items() if key not in errors}, errors


def loading_images_per_s(dataset: ImageDataset, workers: int, batch_size: int, least_seconds: float) -> float:
    """How many samples a second the workers of a data loader prepare, without the first batches, while they start."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    batches = iter(DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, num_workers=workers))
    for _ in range(2 * max(workers, 1)):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < least_seconds:
        count += len(next(batches)["labels"])
    return count / (time.perf_counter() - started)


def error_in_a_line(error: Exception) -> str:
    """The class and the message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def measure_speed(setups: list[Setup], reference: str, rounds: int, least_seconds: float) -> list[dict[str, Any]]:
    """Time networks that take turns with each other and with a product of two large matrices.

    The relative efficiency of a network is its multiply-adds per second over those of the reference in the same round.
    The reference is compiled and checkpointed if the network is. A step of training counts as three forward passes;
    computing activations a second time does not count.

    Args:
        setups: networks with the same mode, dtype, image size, batch size and device.
        reference: the network among them that the others are compared with.
        rounds: how many turns each network has.
        least_seconds: how long a turn takes at least.

    Returns:
        For each setup its fields, and `parameters`, `gmacs` (of an image), `images_per_s` (median),
        `images_per_s_rounds`, `relative_efficiency` and `fraction_of_peak` (both as median, lowest and highest of the
        rounds), and `peak_tflops` (speed of the matrix product); on a GPU also `peak_mib`, of torch's allocator, above
        an `idle_peak_mib` of 0. For a network that failed, its fields and `error`.
    """
    device = setups[0].device
    set_precision(setups[0].dtype)
    torch.compiler.reset()
    workloads, work, peak_mib, errors = build_workloads(setups)
    product = MatrixProduct(setups[0].dtype, device)
    seconds, failed = interleave({"product": product, **workloads}, rounds, least_seconds, device)
    errors |= failed
    peaks = [product.operations / time for time in seconds.pop("product")]
    speeds = {
        setup: [setup.batch_size * work[setup][1] * 1e9 / time for time in times] for setup, times in seconds.items()
    }  # multiply-adds of forward passes per second
    records = []
    for setup in setups:
        if setup in errors:
            records.append({**asdict(setup), "error": errors[setup]})
            continue
        # Prepared as the network is, if nothing was measured without preparation.
        bases = [{"prepared": False, "merged": False}, {"merged": False}, {}]
        found = (speeds.get(Setup(**{**asdict(setup), "network": reference, **how})) for how in bases)
        base = next((speed for speed in found if speed is not None), None)
        record = record_of_speed(setup, work[setup], seconds[setup], speeds[setup], base, peaks)
        records.append(record | ({"peak_mib": peak_mib[setup], "idle_peak_mib": 0} if setup in peak_mib else {}))
    return records


def build_workloads(
    setups: list[Setup],
) -> tuple[dict[Setup, Workload], dict[Setup, tuple[int, float]], dict[Setup, float], dict[Setup, str]]:
    """What was found of each setup: its [`Workload`], its work ([`count_work`]), on a GPU its memory, or its error.

    Memory is the most that torch allocated during a call beyond what it had before the network was built, in MiB.
    """
    workloads: dict[Setup, Workload] = {}
    work: dict[Setup, tuple[int, float]] = {}
    peak_mib: dict[Setup, float] = {}
    errors: dict[Setup, str] = {}
    for setup in setups:
        try:
            work[setup] = count_work(setup.network, setup.image_size)
            is_cuda = torch.device(setup.device).type == "cuda"
            before = torch.cuda.memory_allocated(setup.device) if is_cuda else 0
            workload = Workload(setup)
            if is_cuda:
                workload()  # compiles, chooses algorithms, makes the optimizer's state
                torch.cuda.reset_peak_memory_stats(setup.device)
                workload()
                peak_mib[setup] = (torch.cuda.max_memory_allocated(setup.device) - before) / 2**20
            workloads[setup] = workload
        except Exception as error:
            errors[setup] = error_in_a_line(error)
    return workloads, work, peak_mib, errors


def record_of_speed(
    setup: Setup,
    work: tuple[int, float],
    seconds: list[float],
    speeds: list[float],
    reference_speeds: list[float] | None,
    peaks: list[float],
) -> dict[str, Any]:
    """The figures of one network, see [`measure_speed`].

    Args:
        work: its parameters, and multiply-adds of an image in 1e9.
        seconds: of a call, in each round.
        speeds, reference_speeds: its multiply-adds per second in each round, and the reference's.
        peaks: operations per second of the matrix product in each round.
    """
    parameters, gmacs = work
    images_per_s = [setup.batch_size / time for time in seconds]
    passes = 3 if setup.mode == "training" else 1
    ratios = reference_speeds and [own / other for own, other in zip(speeds, reference_speeds)]
    return {
        **asdict(setup),
        "parameters": parameters,
        "gmacs": gmacs,
        "images_per_s": statistics.median(images_per_s),
        "images_per_s_rounds": images_per_s,
        "relative_efficiency": ratios and spread(ratios),
        "fraction_of_peak": spread([2 * passes * own / peak for own, peak in zip(speeds, peaks)]),
        "peak_tflops": statistics.median(peaks) / 1e12,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def peak_memory(device: str) -> float:
    """The most memory that this process has used, in MiB: on a GPU what torch allocated, on a CPU resident memory.

    Resident memory is read from `/proc`. `ru_maxrss` would not do, since a process inherits it from its parent.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    _, _, after = Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")
    return int(after.split()[0]) / 2**10


def measure_memory(setup: Setup) -> dict[str, float]:
    """Measure peak memory. Call this in a new process, since whatever ran before would count too.

    Returns:
        In MiB: `peak_mib` after two calls (on a CPU this includes what the compiler needs), `idle_peak_mib` before the
        network was built but after all code was loaded, and in training `saved_mib_per_image`, see
        [`saved_activations`].
    """
    set_precision(setup.dtype)
    with torch.device("meta"):
        build_network(setup.network, setup.image_size)
    idle = peak_memory(setup.device)
    workload = Workload(setup)
    workload()
    workload()
    record = {"peak_mib": peak_memory(setup.device), "idle_peak_mib": idle}
    if workload.is_training:
        record["saved_mib_per_image"] = saved_activations(workload) / setup.batch_size / 2**20
    return record


def saved_activations(workload: Workload) -> int:
    """How many bytes the forward pass of a workload keeps for the backward pass, see [`saved_bytes`]."""
    return saved_bytes(workload.loss, [*workload.model.parameters(), *workload.model.buffers()])


def saved_bytes(forward: Callable[[], torch.Tensor], weights: list[torch.Tensor]) -> int:
    """How many bytes a forward pass keeps for the backward pass. Each storage counts once, weights and buffers do not.

    Under autocast, the half-precision copies of the weights count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
