# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The machine: what it computes with, and where and when figures were measured, which every command prints."""

import datetime
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def cpu_capabilities() -> dict[str, Any]:
    """What the processor has, by torch's names, such as `"amx_bf16"`; nothing where torch cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def has_bfloat16(device: str) -> bool:
    """Whether a device multiplies in bfloat16, and does not only imitate it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, commit and date, for a JSON record.

    Args:
        device: what the figures were measured on, `"cpu"` or `"cuda"`.
    """
    is_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    """Kind of processor, and its name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return f"{platform.machine()} CPU" + (f" ({name[1].strip()})" if name else "")


def _commit() -> str | None:
    """Short hash of the checkout that this package runs from, or none if it is not one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
