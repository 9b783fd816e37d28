"""How every test runs: offline, on the CPU, seeded, and leaving the process as it was."""

import os
import sys


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` sets it, for the tests that are marked `gpu`
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores, and so do those that they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import CONFIGS  # noqa: E402


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
