"""The commands and snippets of README.md, CONTRIBUTING.md and docs/ run as tests: `tests/pages.py` says how."""

import pytest
from pages import Reader, find_blocks
from sybil import Sybil
from sybil.parsers.markdown import SkipParser


pytest_collect_file = Sybil(
    [SkipParser(), find_blocks],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    excludes=["*/README.md"],
    fixtures=["reader"],
).pytest()


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run the pages' commands in the shell, without shortening them")


@pytest.fixture(scope="session")
def reader(request, tmp_path_factory):
    """Who runs what the pages show, in one folder for all of them."""
    with Reader(tmp_path_factory.mktemp("reader"), request.config.getoption("whole")) as reader:
        yield reader
