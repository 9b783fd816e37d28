"""Model folders and checkpoint files of strangers: each bad one is a sentence within five seconds and two gigabytes."""

import json
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import (
    ASSETS,
    as_words,
    class_token_config,
    original_weights,
    pyramid_config,
    rotated_config,
    save_model,
    windowed_config,
)
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from vitae_hf import (
    ViTAEBackbone,
    ViTAEForMaskedImageModeling,
    ViTAEForPreTraining,
    ViTAEModel,
    ViTAEv2Backbone,
    config_from_preset,
)
from vitae_hf.commands import detect, segment, train
from vitae_hf.messages import listed, printable
from vitae_hf.model_folders import check_model, weight_files
from vitae_hf.web.visitors import Models


SNEAKER = ASSETS / "sneaker.png"
# Runs commands as a shell does, and the page's answers, one after the other: five seconds of the processor for each and
# two gigabytes more than what is loaded.
BOUNDED = """
import contextlib, io, json, pathlib, resource, signal, sys
import torch, transformers, vitae_cli
from vitae_hf.evaluation import explanation
from vitae_hf.hub import conversion
from vitae_hf.web.page import examine
from vitae_hf.web.visitors import Models

class Late(BaseException):
    pass

def late(*_):
    raise Late

def ask(program, *arguments):
    if program == "page":
        return 0, examine(Models(root=pathlib.Path(arguments[0])), {"path": arguments[1]}, arguments[2])[1]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            vitae_cli.main([program, *arguments])
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


# ---------------------------------------------------------------------------------------------------- folders


def change(name: str, **fields):
    def spoil(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    return spoil


def config(**fields):
    return change("config.json", **fields)


def processor(**fields):
    return change("preprocessor_config.json", **fields)


def size(side: int) -> dict:
    return {"size": {"height": side, "width": side}}


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


NESTED = "[" * 200_000 + "]" * 200_000
PAIRS = [f'"{index}": ""' for index in range(300_000)]
BAD_FOLDERS = {  # what is wrong with them, and what is said
    "deep": (config(depths=[0, 1, 10**4]), "172 of the 320,108 tensors"),
    "deeper": (config(depths=[10**7, 10**7, 10**7]), "172 of the 960,000,076 tensors"),
    "many classes": (config(num_labels=10**9, id2label=None), "claims 1000000000 classes"),
    "many names": (
        write("config.json", '{"model_type": "vitae", "id2label": {' + ", ".join(PAIRS) + "}}"),
        "300,000 names",
    ),
    "other classes": (config(id2label={"0": "a"}), "classifier.bias is (5,), expected (1,)"),
    "classes without a name": (config(id2label={str(index): "a" for index in range(3, 8)}), "a name for each class"),
    "wide": (config(mlp_ratio=1e308), "`mlp_ratio` in stage 2 must give a width"),
    "wider": (config(hidden_sizes=[16, 24, 10**300]), "`hidden_sizes` must be at most"),
    "other widths": (config(num_channels=4), "do not fit its configuration"),
    "many dilations": (config(reduction_dilations=[[1] * 10**6, [1, 2, 3], [1, 2]]), "letters, at most"),
    "far dilations": (config(reduction_dilations=[[1, 2, 3, 10**9], [1, 2, 3], [1, 2]]), "may be 64 at most"),
    "nested": (write("config.json", NESTED), "no JSON that can be read"),
    "a list": (write("config.json", "[]"), "must be a JSON object"),
    "endless": (
        lambda folder: (folder / "config.json").unlink() or (folder / "config.json").symlink_to("/dev/zero"),
        "no file",
    ),
    "code from elsewhere": (config(attn_implementation="org/kernel"), "asks for code from elsewhere"),
    "other weights": (config(transformers_weights="other.safetensors"), "leads to other files"),
    "no architecture": (config(architectures=[1]), "`architectures` of"),
    "no tensors": (
        lambda folder: save_file({}, folder / "model.safetensors", {"format": "pt"}),
        "weights without tensors",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights in safetensors"),
    "no header": (write("model.safetensors", "\xff" * 20), "a header of"),
    "a dead link": (
        lambda folder: (folder / "model.safetensors").unlink() or (folder / "model.safetensors").symlink_to("none"),
        "no weights in safetensors",
    ),
    "huge pictures": (processor(**size(30_000)), "`size` over `crop_pct`"),
    "vast pictures": (processor(**size(10**6)), "`size` over `crop_pct`"),
    "no pictures": (processor(**size(0)), "`size` must have 'height' and 'width'"),
    "a tiny crop": (processor(crop_pct=1e-9), "`size` over `crop_pct`"),
    "no filter": (processor(resample=99), "`resample` must be one of"),
    "no deviation": (processor(image_std=[0, 1, 1]), "`image_std` must be finite numbers"),
    "endless means": (processor(image_mean=[0, 1, float("inf")]), "`image_mean` must be finite"),
    "one mean": (processor(image_mean=[0.5], image_std=[0.5]), "means of 1 channels, the model takes 3"),
    "one mean, three deviations": (processor(image_mean=[0.5]), "a number for each channel, got 1 and 3 numbers"),
    "no scale": (processor(rescale_factor=float("nan")), "`rescale_factor` must be a positive number"),
    "a nested processor": (write("preprocessor_config.json", NESTED), "no JSON that can be read"),
}
NOT_OFFERED = {"nested", "a list", "endless", "many names", "no architecture"}  # by the page


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("good") / "model", pyramid_config())


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence_of_the_command_and_of_the_page(name, good, told, tmp_path):
    spoil, wanted = BAD_FOLDERS[name]
    spoil(shutil.copytree(good, tmp_path / "root" / "bad"))
    status, said = told("explain", tmp_path / "root" / "bad", SNEAKER, "--output", tmp_path / "out")
    assert (status, wanted in said, len(said.strip().splitlines()), len(said) < 2000) == (1, True, 1, True), said
    _, shown = told("page", tmp_path / "root", SNEAKER, "root/bad")
    assert ("There is no model" if name in NOT_OFFERED else wanted) in shown and str(tmp_path) not in shown


@pytest.mark.parametrize(
    "command, data", [(train, "fashion_mnist_mini"), (segment, "garment_scenes"), (detect, "garment_scenes")]
)
def test_no_training_begins_with_a_bad_folder(command, data, good, tmp_path):
    spoil, wanted = BAD_FOLDERS["deeper"]
    spoil(shutil.copytree(good, tmp_path / "bad"))
    words = {"model_name_or_path": tmp_path / "bad", "dataset": f"examples/{data}", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=wanted):
        command.main(as_words(words))


def test_the_good_folder_goes_through_both(good, told, tmp_path):
    assert told("explain", good, SNEAKER, "--output", tmp_path / "out")[0] == 0
    assert "seconds" in told("page", good.parent, SNEAKER, f"{good.parent.name}/model")[1]


@pytest.mark.parametrize(
    "model",
    [
        lambda: ViTAEModel(pyramid_config()),
        lambda: ViTAEv2Backbone(windowed_config()),
        lambda: ViTAEForPreTraining(class_token_config(conv_kernel_size=1)),
        lambda: ViTAEForMaskedImageModeling(pyramid_config()),
        lambda: ViTAEBackbone(rotated_config(depths=(4,), global_attn_indexes=(1, 3), rescaled_cells=(0, 1, 2, 3))),
        lambda: ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
    ],
)
@pytest.mark.parametrize("most_in_a_file", ["5GB", "50KB"])
def test_what_save_pretrained_writes_goes_through(model, most_in_a_file, tmp_path):
    model().save_pretrained(tmp_path, max_shard_size=most_in_a_file)
    files = weight_files(tmp_path)
    assert len(files) > 1 or most_in_a_file == "5GB"
    check_model(tmp_path)
    if len(files) > 1:  # half a download
        files[0].unlink()
        with pytest.raises(ValueError, match=f"lacks weights that its index names: {files[0].name}"):
            check_model(tmp_path)


def test_a_page_offers_what_is_good_beside_what_is_bad(good, tmp_path):
    shutil.copytree(good, tmp_path / "good")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to("nothing")
    for name in NOT_OFFERED:
        BAD_FOLDERS[name][0](shutil.copytree(good, tmp_path / name))
    assert list(Models(root=tmp_path).folders()) == [f"{tmp_path.name}/good"]


def test_a_page_refuses_attention_that_costs_too_much(tmp_path):
    """By the size of its pictures, or by windows, of which no weights tell."""
    save_model(tmp_path / "pictures", pyramid_config())
    processor(**size(2048))(tmp_path / "pictures")
    save_model(tmp_path / "windows", windowed_config())
    config(window_sizes=[10**6, 5, None])(tmp_path / "windows")
    for name, message in (("pictures", "65,537 tokens"), ("windows", "dilations and windows may be 64 at most")):
        with pytest.raises(ValueError, match=message):
            Models(root=tmp_path).load(f"{tmp_path.name}/{name}")


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


CHINESE = 7 * "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))  # in 420 kB
SCALAR = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("V2000000000") + b"\x85R\x85R"
BAD_CHECKPOINTS = {
    "punycode": (pickled(b"c_codecs\nencode\n" + text(CHINESE) + text("punycode") + b"\x86R"), "no state dict"),
    "an array of 2 GB": (pickled(SCALAR), "no state dict"),
    "bytes of 2 GB": (pickled(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "asks to run __builtin__.bytearray"),
    "a memo of 4·10⁹": (pickled(b"Nr\xff\xff\xff\xff"), "damaged or asks for more than weights"),
    "many settings": (pickled(b"](" + b"N" * 5_000_000 + b"e"), "more than 1,048,576 names and settings"),
    "long settings": (pickled(text(70 * 2**20 * " ")), "bytes of names and settings, at most 67,108,864 are read"),
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
    "not a number": (weights(bias=lambda bias: bias / 0 * 0, weight=torch.exp), "not finite: head.bias"),
    "endless": (weights(bias=lambda bias: bias.abs() / 0), "not finite: head.bias"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_sentence(name, told, tmp_path):
    save, wanted = BAD_CHECKPOINTS[name]
    save(tmp_path / "bad.pth")
    status, said = told("convert", tmp_path / "bad.pth", "--output", tmp_path / "out")
    assert (status, wanted in said, len(said.strip().splitlines()), len(said) < 2000) == (1, True, 1, True), said
    assert not (tmp_path / "out").exists()


def test_names_of_a_file_cannot_look_like_our_own_lines(told, tmp_path):
    extra = {f"layer\n{index}\x1b[2J\u202eerror": torch.zeros(1) for index in range(2000)}
    torch.save(original_weights(config_from_preset("vitae-nano")) | extra, tmp_path / "names.pth")
    status, said = told("convert", tmp_path / "names.pth", "--output", tmp_path / "out")
    assert (status, len(said.strip().splitlines()), said.strip().endswith("… and 1990 more")) == (1, 1, True), said
    assert r"not expected: layer\n0\x1b[2J\u202eerror not expected" in said


def test_names_are_few_short_and_printable():
    assert listed(["a", "b\r\nc", "\ud800"]) == r"a, b\r\nc, \ud800"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more"
    assert len(printable("long" * 100)) == 100 and printable("Füße 猫") == "Füße 猫"
