"""How the commands and snippets of the documentation run: page by page, in order, as a reader would run them.

The blocks of ```bash and ```python of a page run in a folder of its own, and Python keeps its names to the end of the
page. The Hub is the tests' own server. A block of ```text right below shows the end of what is printed, or the sentence
that a command fails with; "…" in it stands for what may differ. Comments above a block say more of it:

    <!-- skip: next "reason" -->       it does not run
    <!-- quick: --max_steps 2 -->      the default suite adds these words to `vitae` commands, and compares no numbers

`pytest --whole docs README.md` runs all commands in the shell, without such words; it takes minutes.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from helpers import ASSETS, DATA, REPOSITORY, original_weights
from hub_server import HubServer
from PIL import Image
from sybil import Document, Example, Region

import vitae_cli
from vitae_hf import config_from_preset
from vitae_hf.data.sources import load_labelled_images


FENCE = re.compile(r"^ *```(\S+)?.*\n(?:.*\n)*? *```$", flags=re.MULTILINE)
BLOCK = re.compile(
    r"^(?:<!-- quick:(?P<added>.*)-->\n)?```(?P<language>bash|python)\n(?P<code>(?:.*\n)*?)```$"
    r"(?:\n\n```text\n(?P<shown>(?:.*\n)*?)```$)?",
    flags=re.MULTILINE,
)
FAILURE = re.compile(r"^(vitae \w+: )?(error|[\w.]+Error): ", flags=re.MULTILINE)
NAMES: dict[str, dict] = {}  # of each page's Python, in the process that runs it


class Block(NamedTuple):
    """A command or snippet of a page, the output shown below it, and the words that make it quick."""

    added: str | None
    language: str
    code: str
    shown: str | None


class Done(NamedTuple):
    """What a command or snippet did."""

    failed: bool
    printed: str
    error: str


def find_blocks(document: Document) -> Iterator[Region]:
    blocks = list(BLOCK.finditer(document.text))
    languages = [match[1] for match in FENCE.finditer(document.text)]
    if unnamed := languages.count(None):
        raise ValueError(f"{document.path}: {unnamed} blocks without a language: bash or python to run, text to show")
    if sum(language in ("bash", "python") for language in languages) != len(blocks):
        raise ValueError(f"{document.path}: blocks of bash and python must begin at the left margin")
    for match in blocks:
        yield Region(match.start(), match.end(), Block(**match.groupdict()), run_example)


def run_example(example: Example) -> str | None:
    """Run a block in its turn. Returns what is wrong, if anything is."""
    reader, block = example.namespace["reader"], example.parsed
    home = reader.home_of(example.path)
    if block.language == "bash":
        done = reader.run_commands(home, block.code, block.added)
    else:
        done = reader.submit(run_python, home, block.code)
    if done.failed != bool(FAILURE.match(block.shown or "")):
        what = "failed" if done.failed else "did not fail"
        return f"{block.code}\n{what}:\n{done.printed[-2000:]}{done.error[-4000:]}"
    output = done.error if done.failed else done.printed
    is_quick = block.added is not None and not reader.whole
    if block.shown is not None and not re.search(pattern_of(block.shown, is_quick), output, flags=re.DOTALL):
        return f"{block.code}\nshows\n{block.shown}\nbut prints\n{output[-4000:]}"
    return None


def pattern_of(shown: str, is_quick: bool) -> str:
    """The regular expression that the output must match at its end."""
    if is_quick:
        shown = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "…", shown)
    return r"(?:^|\n)" + re.escape(shown.strip()).replace("…", ".*") + r"\s*\Z"


class Reader:
    """Somebody with a checkout, a folder of pictures, one of the authors' checkpoints and an account on the Hub."""

    def __init__(self, folder: Path, whole: bool = False):
        self.folder, self.whole = folder, whole

    def __enter__(self) -> "Reader":
        self.hub = HubServer(self.folder / "hub").__enter__()
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = {**self.hub.environment(self.folder / "cache"), "PATH": programs, "MPLBACKEND": "agg"}
        self.process = ProcessPoolExecutor(1, get_context("spawn"))
        with patch.dict(os.environ, self.variables):  # which the Hub's client reads when it is imported
            self.submit(furnish, self.folder / "furniture")
        return self

    def __exit__(self, *error):
        self.process.shutdown()
        self.hub.__exit__(*error)
        shutil.rmtree(self.folder)

    def home_of(self, page: str) -> Path:
        """The folder in which a page's commands run, with what all of them take for granted."""
        home = self.folder / Path(page).stem
        if not home.exists():
            home.mkdir()
            for thing in (self.folder / "furniture").iterdir():
                (home / thing.name).symlink_to(thing)
        return home

    def submit(self, function, *arguments) -> Done:
        return self.process.submit(function, *arguments).result()

    def run_commands(self, home: Path, code: str, added: str | None) -> Done:
        """Run the lines of a block until one fails."""
        printed = ""
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["vitae"] and not self.whole and not {"|", ">", "&&"} & set(words):
                done = self.submit(run_vitae, home, words[1:] + shlex.split(added or ""))
            elif words:
                done = run_in_shell(home, line, self.variables)
            else:
                continue
            printed += done.printed
            if done.failed:
                break
        return done._replace(printed=printed)


def furnish(folder: Path) -> None:
    """Put into a folder what the pages take for granted."""
    folder.mkdir()
    for name in ("examples", "scripts", "src", "results"):
        (folder / name).symlink_to(REPOSITORY / name)
    Image.open(ASSETS / "chelsea.png").convert("RGB").save(folder / "cat.jpg")
    shutil.copy(ASSETS / "sneaker.png", folder)
    torch.save({"state_dict_ema": original_weights(config_from_preset("vitae-t"))}, folder / "ViTAE-T.pth.tar")
    rows = load_labelled_images(str(DATA), splits=["test"])["test"].select(range(250))
    for label, name in ((8, "bags"), (9, "boots")):
        (folder / "pictures" / name).mkdir(parents=True)
        for number, row in enumerate(row for row in rows if row["label"] == label):
            (folder / "pictures" / name / f"{number:02}.png").write_bytes(row["image"]["bytes"])


def run_in_shell(home: Path, line: str, variables: dict[str, str]) -> Done:
    environment = {**os.environ, **variables}
    done = subprocess.run(["bash", "-c", line], cwd=home, env=environment, capture_output=True, text=True, check=False)
    lines = [said for said in done.stderr.splitlines(keepends=True) if "%|" not in said]  # a progress bar is drawn last
    return Done(done.returncode != 0, done.stdout, "".join(lines))


def run_vitae(home: Path, words: list[str]) -> Done:
    """A command in this process, which has already imported what takes seconds."""
    os.chdir(home)
    printed, said, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(said):
        try:
            vitae_cli.main(words)
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = traceback.print_exc() or 1
    return Done(bool(status), printed.getvalue(), said.getvalue())


def run_python(home: Path, code: str) -> Done:
    os.chdir(home)
    printed, error = io.StringIO(), ""
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        try:
            exec(compile(code, home.name, "exec"), NAMES.setdefault(home.name, {"__name__": "__main__"}))  # noqa: S102
        except Exception:
            error = traceback.format_exc()
    return Done(bool(error), printed.getvalue(), error)
