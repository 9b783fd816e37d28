# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How a command ends: with its record as the last line, or with one sentence that says what went wrong."""

import argparse
import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, StrictDataclassError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Errors that files, names, arguments, data and the network cause. Any other error is a mistake in this package and
# keeps its traceback.
FAILURES = (
    OSError,
    ValueError,
    ImportError,
    FloatingPointError,
    StrictDataclassError,
    SafetensorError,
    httpx.HTTPError,  # which is no OSError
    torch.OutOfMemoryError,
)
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        *("torchvision", "accelerate", "datasets", "evaluate", "timm"),
        *("matplotlib", "tensorboard", "pyarrow", "sklearn"),
    ),
    "explain": ("pytorch_grad_cam", "matplotlib"),
    "export": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "executorch": ("executorch",),
    "litert": ("litert_torch",),
    "coreml": ("coremltools",),
    "quantize": ("torchao", "bitsandbytes", "accelerate"),
}
EXTRAS["detection"] = (*EXTRAS["train"], "pycocotools", "scipy")
EXTRAS["demo"] = (*EXTRAS["train"], *EXTRAS["explain"], "gradio")
"""What `pip install "vitae-hf[EXTRA]"` installs, as it is imported; `setup.cfg` has the versions."""
OF_A_WORKER = re.compile(r"Original Traceback.*\n[\w.]+: ", re.DOTALL)


def run_command(
    main: Callable[[list[str] | None], dict[str, Any] | None],
    argv: list[str] | None = None,
    status: Callable[[dict[str, Any]], int] = lambda record: 0,
) -> None:
    """Run a command and end the process: its record as a line of JSON, or a sentence on stderr and status 1.

    The status is 130 after Ctrl-C, and 141 where nobody reads what is printed, such as before `head`.

    Under torchrun the first process alone prints the record. TRANSFORMERS_VERBOSITY=debug shows where a failure arose.

    Args:
        main: what the command does with its arguments. An error that is one of `FAILURES`, or was raised from one,
            becomes the sentence; any other is raised.
        argv: default: of this process.
        status: exit status for a record.
    """
    try:
        record = main(argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not is_listened_to():
            leave_quietly()
        if not any(isinstance(cause, FAILURES) or is_of_data(cause) for cause in causes(error)):
            raise
        logger.debug("a command failed", exc_info=error)
        print(f"\nerror: {plain_words(error)}", file=sys.stderr)  # below a progress bar
        sys.exit(1)
    try:
        if record is not None and os.environ.get("RANK", "0") == "0":
            print(json.dumps(record), flush=True)
    except BrokenPipeError:
        leave_quietly()
    sys.exit(status(record or {}))


def is_listened_to() -> bool:
    """Whether what the process prints can still be written."""
    try:
        print(flush=True)  # an empty line, since writing nothing always succeeds
    except BrokenPipeError:
        return False
    return True


def silence_closed_pipes() -> None:
    """Let what this process prints go nowhere where its reader has ended, or is just about to, rather than fail."""
    if not hasattr(select, "poll"):  # on Windows
        return
    time.sleep(0.1)
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def leave_quietly() -> NoReturn:
    """End the process of which nobody reads what it prints, such as before `head`, as shells expect it."""
    with suppress(io.UnsupportedOperation):  # of a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
    sys.exit(128 + 13)  # SIGPIPE, which not all systems have


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Note on every error raised within which folder, repository or data set it is about.

    Errors of the network do not say so; [`plain_words`] then does.
    """
    try:
        yield
    except Exception as error:
        error.add_note(str(subject))
        raise


def device(name: str) -> str:
    """The type of an argument `--device`, for argparse.

    Raises:
        argparse.ArgumentTypeError: this machine has no such device.
    """
    try:
        torch.empty(0, device=name)
    except Exception as error:  # each kind of device raises errors of its own
        raise argparse.ArgumentTypeError(f"there is no device {name!r} here ({first_line(error)})") from error
    return name


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def is_of_data(error: BaseException) -> bool:
    """Whether it is an error of `datasets` or pyarrow, some of whose classes are derived from no usual one."""
    return type(error).__module__ in ("datasets.exceptions", "pyarrow.lib")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def plain_words(error: BaseException) -> str:
    """What went wrong in one sentence, without the token; see [`about`] for what it was about."""
    chain = causes(error)
    notes = [note for cause in chain for note in getattr(cause, "__notes__", [])]
    sentence = of_a_missing_package(error) or of_the_hub(chain, notes[0] if notes else "what was asked for")
    if sentence is None:
        sentence = what_it_says(chain)
        if notes and notes[0] not in sentence:
            sentence = f"{notes[0]}: {sentence}"
    sentence = sentence.replace(get_token() or "\n", "…")
    return re.sub(r"\bhf_\w{20,}", "…", sentence)


def of_the_hub(chain: list[BaseException], subject: str) -> str | None:
    """What the Hub or the network says of a subject, if the failure is theirs."""
    response = next((cause.response for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    status = None if response is None else response.status_code
    if status == 401 or isinstance(chain[0], LocalTokenNotFoundError):
        problem = "not accepted" if get_token() else "missing"
        return (
            f"{subject} is not there for you: the Hub token is {problem}; log in with `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return f"the Hub token may not do this to {subject}: it takes one that may write"
    if status == 412:
        return f"{subject} was changed by somebody else in the meantime; nothing was uploaded, run it again"
    if status is not None and (status >= 500 or status == 429):
        return f"the Hub failed with status {status} for {subject}; run it again, it goes on where it is needed"
    if status is None and any(isinstance(cause, (httpx.HTTPError, ConnectionError)) for cause in chain):
        place = f"{constants.ENDPOINT} for {subject} ({first_line(chain[-1])})"
        return f"no connection to {place}; run it again, it goes on where it is needed"
    if status == 404:
        return f"{subject} is not on the Hub ({first_line(chain[0])})"
    if any(isinstance(cause, HFValidationError) for cause in chain):
        return f"{subject} is neither a folder nor a name on the Hub"
    return None


def of_a_missing_package(error: BaseException, needed_by: str = "this", extra: str | None = None) -> str | None:
    """Which package is not installed and what installs it, if the failure is that an extra of `EXTRAS` is.

    Args:
        needed_by: what needs the package.
        extra: which to install of several that have the package; default: the first.
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    found = [name for name, modules in EXTRAS.items() if module in modules]
    if not found:
        return None
    chosen = extra if extra in found else found[0]
    return f'{needed_by} needs {module}, which is not installed: pip install "vitae-hf[{chosen}]"'


def what_it_says(chain: list[BaseException]) -> str:
    """The message of an error in one line, without the traceback that a data loader's worker puts before it."""
    # A `DatasetGenerationError` says only that there was another error.
    error = chain[-1] if type(chain[0]).__name__ == "DatasetGenerationError" else chain[0]
    said = OF_A_WORKER.sub("", str(error)) if "Original Traceback" in str(error) else str(error)
    said = re.sub(r"^Caught \w+ in DataLoader worker process \d+\.", "", said)
    return " ".join(line.strip() for line in said.splitlines() if line.strip()) or type(error).__name__
