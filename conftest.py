"""The commands and snippets of README.md, CONTRIBUTING.md and docs/ run as tests: `tests/pages.py` says how.

Tests are offline and on the CPU.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` sets it, for the tests that are marked `gpu`
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores, and so do those that they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
from pages import Reader, find_blocks  # noqa: E402
from sybil import Sybil  # noqa: E402
from sybil.parsers.markdown import SkipParser  # noqa: E402


pytest_collect_file = Sybil(
    [SkipParser(), find_blocks],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    excludes=["*/README.md"],
    fixtures=["reader"],
).pytest()


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="run the pages' commands in the shell, without shortening them"
    )


@pytest.fixture(scope="session")
def reader(request, tmp_path_factory):
    """Who runs what the pages show, in one folder for all of them."""
    with Reader(tmp_path_factory.mktemp("reader"), request.config.getoption("whole")) as reader:
        yield reader
