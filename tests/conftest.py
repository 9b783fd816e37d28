"""How every test runs: seeded, and leaving the process as it was. `conftest.py` above keeps it offline, on the CPU."""

import sys

import pytest
import torch
from helpers import CONFIGS


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU, or `CUDA_VISIBLE_DEVICES` hides it"))


@pytest.fixture(params=list(CONFIGS))
def tiny_config(request):
    """A function that makes the tiny configuration of each kind, with overrides."""
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads_stay():
    """A command that sets the number of threads, which decides the last bits, sets it for the whole process."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def compiled_anew():
    """All models share the library's code, of which torch 2.11 compiles eight versions in a process and no more."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
