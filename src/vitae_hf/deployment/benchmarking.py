# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Speed, work and memory of classifiers, ours and others', measured side by side.

Speed is only comparable within one run, in which the networks take turns (`interleave`), and then by ratios, since no
machine is equally fast at all times. Every network has 1,000 classes, random weights and random images in memory.
"""

import math
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    ConvNextForImageClassification,
    DeiTForImageClassification,
    ResNetForImageClassification,
    SwinForImageClassification,
    ViTForImageClassification,
)

from ..presets import PRESETS, config_from_preset
from .inference import prepare_for_inference


_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
OTHERS = {
    "vit-s": (ViTForImageClassification, _SMALL),
    "vit-b": (ViTForImageClassification, {}),
    "deit-s": (DeiTForImageClassification, _SMALL),
    "swin-t": (SwinForImageClassification, {}),  # 96 wide, depths 2, 2, 6, 2, windows of 7
    "convnext-t": (ConvNextForImageClassification, {}),
    "resnet-50": (ResNetForImageClassification, {}),
}
"""Networks of transformers: class of the model, and where its configuration differs from the defaults."""

PRECISIONS = {  # dtype of the weights, bfloat16 autocast, TF32
    "float32": (torch.float32, False, False),
    "tf32": (torch.float32, False, True),  # on GPUs
    "bfloat16": (torch.bfloat16, False, False),
    "float16": (torch.float16, False, False),
    "autocast": (torch.float32, True, True),  # bfloat16 over float32 weights, as `ViTAETrainer` trains on a GPU
}


@dataclass(frozen=True)
class Case:
    """A network in the circumstances under which it is measured.

    Args:
        network: a preset, one of `OTHERS`, or `timm:` and the name of a model there.
        image_size: height and width in pixels.
        batch_size: images at a time.
        mode: `"inference"`, or `"training"`: forward, cross-entropy, backward and AdamW.
        dtype: one of `PRECISIONS`.
        device: where torch shall run it.
        compiled: by `torch.compile`.
        checkpointing: gradient checkpointing, in training.
        channels_last: memory format of weights and images.
        prepared: by `prepare_for_inference`; presets only, and only for inference.
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


def is_known(network: str) -> bool:
    """Whether [`build_network`] can build it."""
    if network.startswith("timm:"):
        import timm  # not at the top, here and below: only some need it

        return timm.is_model(network.removeprefix("timm:"))
    return network in PRESETS or network in OTHERS


def build_network(network: str, image_size: tuple[int, int]) -> nn.Module:
    """A classifier of 1,000 classes with random weights; where positions are learned, they are those of the size.

    Args:
        network: as in [`Case`].
        image_size: height and width in pixels.

    Raises:
        ValueError: no such network, or the size is not one of its own.
        RuntimeError: timm does not know the name.
    """
    if network.startswith("timm:"):
        import timm

        try:
            return timm.create_model(network.removeprefix("timm:"), img_size=image_size)
        except TypeError:  # convolutional networks take any size
            return timm.create_model(network.removeprefix("timm:"))
    if network in OTHERS:
        model_class, fields = OTHERS[network]
        return model_class(model_class.config_class(image_size=image_size, num_labels=1000, **fields))
    config = config_from_preset(network, image_size=image_size, num_labels=1000)
    return AutoModelForImageClassification.from_config(config)


@lru_cache
@torch.no_grad()
def count_work(network: str, image_size: tuple[int, int]) -> tuple[int, float]:
    """Parameters, and multiply-adds in 1e9 of one image through the forward pass, attention included.

    Counted on the meta device, where no fused attention hides its products. Errors are those of the network.
    """
    with torch.device("meta"):
        model = build_network(network, image_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *image_size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


class Workload:
    """A case made ready: each call is one forward pass or one step of training on the same images."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        dtype, self.autocast, _ = PRECISIONS[case.dtype]
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        self.case, self.is_training = case, case.mode == "training"
        model = build_network(case.network, case.image_size).to(case.device, dtype, memory_format=layout)
        if case.prepared:
            self.model = prepare_for_inference(model, compile=case.compiled)
        else:
            self.model = model.train(self.is_training)
        if case.checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None) or model.set_grad_checkpointing
            enable()
        self.run = model
        if case.compiled:  # networks of one class count together; beyond the limit they run eagerly
            torch._dynamo.config.recompile_limit = 64
            self.run = model if case.prepared else torch.compile(model, dynamic=False)
        pixels = torch.randn(case.batch_size, 3, *case.image_size, device=case.device, dtype=dtype)
        self.pixels = pixels.contiguous(memory_format=layout)
        self.labels = torch.randint(0, 1000, (case.batch_size,), device=case.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True) if self.is_training else None

    def logits(self) -> torch.Tensor:
        device_type = torch.device(self.case.device).type
        with torch.autocast(device_type, torch.bfloat16) if self.autocast else nullcontext():
            outputs = self.run(self.pixels)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.logits

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits().float(), self.labels)

    def __call__(self) -> None:
        if not self.is_training:
            with torch.no_grad():
                self.logits()
            return
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class MatrixProduct:
    """Each call is one product of two square matrices of the size at which the device is fastest."""

    SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}

    def __init__(self, dtype: str, device: str):
        weight_dtype, autocast, _ = PRECISIONS[dtype]
        self.device, self.dtype = device, torch.bfloat16 if autocast else weight_dtype
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
        """Multiplications and additions of a call."""
        return 2 * self.side**3

    def __call__(self) -> None:
        self.left @ self.right


def set_precision(dtype: str) -> None:
    """Allow TF32, or not, as one of `PRECISIONS` asks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = PRECISIONS[dtype][2]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], None], calls: int, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def warm_up(function: Callable[[], None], least_seconds: float, device: str) -> int:
    """How many calls take `least_seconds`, after two that need not be as fast."""
    seconds_per_call(function, 2, device)
    return max(1, math.ceil(least_seconds / seconds_per_call(function, 1, device)))


def interleave(
    functions: dict[object, Callable[[], None]], rounds: int, least_seconds: float, device: str
) -> tuple[dict[object, list[float]], dict[object, str]]:
    """Time functions in turn, several rounds, each in a round for at least `least_seconds`.

    Returns:
        Seconds per call in each round, by the function's key; and the errors of those that failed, which have no times.
    """
    calls, seconds, errors = {}, {key: [] for key in functions}, {}
    for round_idx in range(-1, rounds):
        for key, function in functions.items():
            if key in errors:
                continue
            try:
                if round_idx < 0:
                    calls[key] = warm_up(function, least_seconds, device)
                else:
                    seconds[key].append(seconds_per_call(function, calls[key], device))
            except Exception as error:  # out of memory, for one: the others' times are still wanted
                errors[key] = describe(error)
    return {key: times for key, times in seconds.items() if key not in errors}, errors


def describe(error: Exception) -> str:
    """Its kind and what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def measure_speed(cases: list[Case], reference: str, rounds: int, least_seconds: float) -> list[dict]:
    """Time networks in turn, and the device's matrix product with them.

    The relative efficiency of a network is images/s × multiply-adds per image over that of the reference in the same
    round, both compiled or not, both checkpointing or not. Training counts as three times the multiply-adds of the
    forward pass, recomputation not at all.

    Args:
        cases: of one mode, dtype, image size, batch size and device.
        reference: their network that the others are compared with.
        rounds: how many times each has its turn.
        least_seconds: length of a turn.

    Returns:
        For each case its fields and `parameters`, `gmacs` of an image, `images_per_s` (median), `images_per_s_rounds`,
        `relative_efficiency` and `fraction_of_peak` (each the median, lowest and highest of the rounds), `peak_tflops`
        (the matrix product's); or its fields and `error`.
    """
    device = cases[0].device
    set_precision(cases[0].dtype)
    torch.compiler.reset()
    functions, errors, work = {}, {}, {}
    for case in cases:
        try:
            work[case] = count_work(case.network, case.image_size)
            functions[case] = Workload(case)
        except Exception as error:
            errors[case] = describe(error)
    product = MatrixProduct(cases[0].dtype, device)
    seconds, failed = interleave({"product": product, **functions}, rounds, least_seconds, device)
    errors |= failed
    peaks = [product.operations / time for time in seconds.pop("product")]
    speeds = {
        case: [case.batch_size * work[case][1] * 1e9 / time for time in times] for case, times in seconds.items()
    }  # multiply-adds of forward passes per second
    passes = 3 if cases[0].mode == "training" else 1
    records = []
    for case in cases:
        if case in errors:
            records.append({**asdict(case), "error": errors[case]})
            continue
        parameters, gmacs = work[case]
        images_per_s = [case.batch_size / time for time in seconds[case]]
        base = speeds.get(Case(**{**asdict(case), "network": reference, "prepared": False}))
        records.append(
            {
                **asdict(case),
                "parameters": parameters,
                "gmacs": gmacs,
                "images_per_s": statistics.median(images_per_s),
                "images_per_s_rounds": images_per_s,
                "relative_efficiency": base and spread([own / other for own, other in zip(speeds[case], base)]),
                "fraction_of_peak": spread([2 * passes * own / peak for own, peak in zip(speeds[case], peaks)]),
                "peak_tflops": statistics.median(peaks) / 1e12,
            }
        )
    return records


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def peak_memory(device: str) -> float:
    """The most memory that this process has had, in MiB: what torch allocated on a GPU, resident memory on a CPU.

    Linux tells the latter. Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def measure_memory(case: Case) -> dict[str, float]:
    """Peak memory of a case; only means something in a fresh process, where nothing else has run.

    Returns:
        In MiB: `peak_mib` after two calls (the compiler's own memory included on a CPU, if there is one),
        `idle_peak_mib` before the network was built but with all code loaded, and in training
        `saved_mib_per_image`, see [`saved_activations`].
    """
    set_precision(case.dtype)
    with torch.device("meta"):
        build_network(case.network, case.image_size)
    idle = peak_memory(case.device)
    workload = Workload(case)
    workload()
    workload()
    record = {"peak_mib": peak_memory(case.device), "idle_peak_mib": idle}
    if workload.is_training:
        record["saved_mib_per_image"] = saved_activations(workload) / case.batch_size / 2**20
    return record


def saved_activations(workload: Workload) -> int:
    """Bytes that the forward pass of a workload keeps for the backward pass, see [`saved_bytes`]."""
    return saved_bytes(workload.loss, [*workload.model.parameters(), *workload.model.buffers()])


def saved_bytes(forward: Callable[[], torch.Tensor], weights: list[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage counted once, without weights and buffers.

    Under autocast the half-precision copies of the weights are among them.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, lest another takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
