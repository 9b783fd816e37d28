"""Checkpoint files of strangers: each bad one is a sentence within five seconds and two gigabytes."""

import json
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import REPOSITORY, original_weights

from vitae_hf import config_from_preset
from vitae_hf.messages import listed, printable


SNEAKER = REPOSITORY / "examples" / "sneaker.png"
EXPLAIN, CONVERT = (REPOSITORY / "scripts" / f"{name}.py" for name in ("explain", "convert_original_checkpoint"))
# Runs commands as a shell does, and the page's answers, one after the other: five seconds of the processor for each and
# two gigabytes more than what is loaded.
BOUNDED = """
import contextlib, io, json, pathlib, resource, runpy, signal, sys
import torch, transformers
from vitae_hf import conversion, explanation
from vitae_hf.app import examine
from vitae_hf.visitors import Models

class Late(BaseException):
    pass

def late(*_):
    raise Late

def ask(program, *arguments):
    if program == "page":
        return 0, examine(Models(root=pathlib.Path(arguments[0])), {"path": arguments[1]}, arguments[2])[1]
    sys.argv, told = [program, *arguments], io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            return end.code, told.getvalue()
    return 0, told.getvalue()

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
signal.signal(signal.SIGPROF, late)
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, -1))
for line in sys.stdin:
    case = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, 5)
    try:
        answer = ask(*case)
    except (Exception, Late) as error:
        answer = None, f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), file=sys.__stdout__, flush=True)
"""


@pytest.fixture(scope="module")
def told():
    """A function that gives status and output of a command, or no status where it was stopped or had a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", BOUNDED], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True
    )

    def tell(*words) -> tuple[int | None, str]:
        print(json.dumps([str(word) for word in words]), file=process.stdin, flush=True)
        return tuple(json.loads(process.stdout.readline()))

    with process:
        yield tell
        process.stdin.close()


# ---------------------------------------------------------------------------------------------------- checkpoints


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def pickled(value: bytes):
    """A file of `torch.save` with a pickle of our own: a dictionary of one value."""

    def save(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}" + text("state_dict") + value + b"s.")
            archive.writestr("archive/version", "3\n")

    return save


def weights(**changes):
    """A checkpoint of the smallest variant with some tensors changed."""

    def save(path):
        tensors = original_weights(config_from_preset("vitae-nano"))
        names = {"weight": "head.weight", "bias": "head.bias"}
        torch.save(tensors | {names[name]: value(tensors[names[name]]) for name, value in changes.items()}, path)

    return save


def compressed(path):
    torch.save({"weight": torch.zeros(2**24)}, path.with_suffix(".plain"))
    with (
        zipfile.ZipFile(path.with_suffix(".plain")) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))


def many_unfinite(path):
    torch.save({f"layer {index}": torch.full((1,), torch.nan) for index in range(2000)}, path)


CHINESE = 7 * "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))  # in 420 kB
SCALAR = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("V2000000000") + b"\x85R\x85R"
BAD_CHECKPOINTS = {
    "punycode": (pickled(b"c_codecs\nencode\n" + text(CHINESE) + text("punycode") + b"\x86R"), "no state dict"),
    "an array of 2 GB": (pickled(SCALAR), "no state dict"),
    "bytes of 2 GB": (pickled(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "asks to run __builtin__.bytearray"),
    "a memo of 4·10⁹": (pickled(b"Nr\xff\xff\xff\xff"), "damaged or asks for more than weights"),
    "many settings": (pickled(b"](" + b"N" * 5_000_000 + b"e"), "bytes of names and settings, at most"),
    "many classes": (
        weights(weight=lambda head: head[:1].expand(10**8, -1)),
        "head.weight (claims 6,400,000,000 values",
    ),
    "compressed": (compressed, "compressed members"),
    "meta": (weights(bias=lambda bias: bias.to("meta")), "head.bias (without values, on the device meta)"),
    "sparse": (weights(weight=lambda head: head.to_sparse()), "head.weight (sparse)"),
    "complex": (weights(bias=lambda bias: bias + 1j), "head.bias (complex)"),
    "quantised": (
        weights(weight=lambda head: torch.quantize_per_tensor(head, 0.1, 0, torch.qint8)),
        "head.weight (quantised)",
    ),
    "not a number": (weights(bias=lambda bias: bias / 0 * 0, weight=torch.exp), "head.bias (not finite)"),
    "endless": (weights(bias=lambda bias: bias.abs() / 0), "head.bias (not finite)"),
    "another head": (weights(weight=lambda head: head[:, :7]), "`head.weight`) of vitae-nano reads 64 features, got 7"),
    "many that are not finite": (many_unfinite, "layer 9 (not finite), … and 1990 more"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_sentence(name, told, tmp_path):
    save, wanted = BAD_CHECKPOINTS[name]
    save(tmp_path / "bad.pth")
    status, said = told(CONVERT, tmp_path / "bad.pth", "--output", tmp_path / "out")
    assert (status, wanted in said, len(said.strip().splitlines()), len(said) < 2000) == (1, True, 1, True), said
    assert not (tmp_path / "out").exists()


def test_names_of_a_file_cannot_look_like_our_own_lines(told, tmp_path):
    extra = {f"layer\n{index}\x1b[2J\u202eerror": torch.zeros(1) for index in range(2000)}
    torch.save(original_weights(config_from_preset("vitae-nano")) | extra, tmp_path / "names.pth")
    status, said = told(CONVERT, tmp_path / "names.pth", "--output", tmp_path / "out")
    lines = said.strip().splitlines()
    assert (status, len(lines), lines[-1].strip()) == (1, 12, "… and 1990 more")
    assert lines[1].strip() == r"not expected: layer\n0\x1b[2J\u202eerror"


def test_names_are_few_short_and_printable():
    assert listed(["a", "b\r\nc", "\ud800"]) == r"a, b\r\nc, \ud800"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more"
    assert len(printable("long" * 100)) == 100 and printable("Füße 猫") == "Füße 猫"
