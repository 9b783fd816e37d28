"""The notebook of the documentation: what was committed, and what it does today.

To commit what it shows today:

    python tests/test_notebook.py
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from helpers import REPOSITORY
from hub_server import HubServer
from nbclient import NotebookClient


NOTEBOOK = REPOSITORY / "docs" / "finetune.ipynb"
MOST_BYTES = 1_000_000
SHOWN_BY = {  # what in a cell shows something of this kind
    "image/jpeg": re.compile(r"^(show\(|draw_confusion\(|figure, axes|boot$)", flags=re.MULTILINE),
    "stdout": re.compile(r"(^| )(print|publish)\(", flags=re.MULTILINE),
    "text/html": re.compile(r"trainer\.(train|predict)\("),
}
OF_A_MACHINE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w|[A-Z]:\\\w|127\.0\.0\.1|localhost")
# Bars and warnings are no part of the story.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
QUIET |= {"TRANSFORMERS_VERBOSITY": "error"}


def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def read_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook) -> list[set[str]]:
    """What each cell shows: printed text, an answer, a picture."""
    return [
        {kind for output in cell.outputs for kind in (output.get("data") or [output.get("name", "error")])}
        for cell in read_cells(notebook)
    ]


def run_notebook(folder: Path):
    """Run the notebook from top to bottom, beside the example data, with an account on the tests' hub.

    Returns:
        The notebook with what it showed, and the files that it published.
    """
    (folder / "docs").mkdir()
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    notebook = committed()
    options = {"timeout": 900, "record_timing": False, "resources": {"metadata": {"path": str(folder / "docs")}}}
    with HubServer(folder / "hub") as hub:
        environment = {**os.environ, **hub.environment(folder / "cache"), **QUIET}
        environment.pop("MPLBACKEND", None)  # a notebook shows its figures by a backend of its own
        NotebookClient(notebook, **options).execute(env=environment)
        published = set(hub.repository("tester/garments").find("main")["files"])
    return notebook, published


def test_the_committed_notebook_was_run_once_from_its_top_to_its_end_without_an_error():
    cells = read_cells(committed())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_every_cell_of_the_committed_notebook_shows_what_it_draws_and_prints():
    for cell, shown in zip(read_cells(committed()), kinds(committed())):
        assert {kind for kind, source in SHOWN_BY.items() if source.search(cell.source)} == shown - {"text/plain"}


def test_the_committed_notebook_is_small_and_names_no_machine():
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    notebook = committed()
    for cell in read_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)
    assert not OF_A_MACHINE.search(nbformat.writes(notebook, indent=0))


@pytest.mark.slow
def test_the_notebook_runs_to_its_end_and_publishes_a_model_with_an_explanation(tmp_path):
    notebook, published = run_notebook(tmp_path)
    assert {"model.safetensors", "modeling_vitae.py", "README.md", "explanation.png"} <= published
    assert kinds(notebook) == kinds(committed())
    right = re.search(r"([\d.]+) % of 152 pictures are right", nbformat.writes(notebook))
    assert float(right[1]) > 70


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run_notebook(Path(folder))[0], NOTEBOOK)
