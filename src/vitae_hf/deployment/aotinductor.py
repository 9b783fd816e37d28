# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Programs of AOTInductor: machine code for this kind of processor, which torch runs from Python or C++.

Height and width are fixed. With them open, the compiler simplifies every index of ViTAEv2's windows, a quotient of both
sides, and is not done after ten minutes (results/LOG.md).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


FILE = "model.pt2"
IS_BATCH_OPEN = True


def write(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Compile a network from `pixel_values` to named tensors, for any number of images of the size of the example.

    Raises:
        OSError: there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    examples = {"pixel_values": torch.cat([example, example])}  # torch takes a batch of one for a constant
    program = torch.export.export(network, (), examples, dynamic_shapes=shapes, strict=False)
    settings = {
        "cpp.dynamic_threads": True,  # otherwise it would use as many threads as this process has now
        "aot_inductor.check_lowerbound": False,  # of the batch, which torch supposes to be two or more
    }
    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except InvalidCxxCompiler as error:
        raise OSError(f"the format torch-aoti takes a C++ compiler: {error}") from error


def load(path: Path, **options: Any) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function from `pixel_values` to the named tensors, on as many threads as torch has.

    Args:
        options: of `aoti_load_package`.
    """
    from torch._inductor import aoti_load_package

    run = aoti_load_package(str(path), **options)
    return lambda pixel_values: run(pixel_values=pixel_values)


def why_not_here() -> str | None:
    """Why programs of this format cannot run on this machine, or none if they can."""
    return None
