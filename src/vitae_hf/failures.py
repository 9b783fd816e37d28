# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How a command ends: with its record as the last line, or with one sentence where what it was given will not do."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, StrictDataclassError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What files, names, arguments, data and the network cause; anything else is a mistake of ours and keeps its traceback.
FAILURES = (
    OSError,
    ValueError,
    ImportError,
    FloatingPointError,
    StrictDataclassError,
    SafetensorError,
    httpx.HTTPError,  # no OSError
    torch.OutOfMemoryError,
)
OF_A_WORKER = re.compile(r"Original Traceback.*\n[\w.]+: ", re.DOTALL)


def run_command(
    main: Callable[[list[str] | None], dict | None],
    argv: list[str] | None = None,
    status: Callable[[dict], int] = lambda record: 0,
) -> None:
    """Run a command and end the process: its record as a line of JSON, or a sentence on stderr and status 1.

    Under torchrun the first process alone prints the record. TRANSFORMERS_VERBOSITY=debug shows where a failure arose.

    Args:
        main: what the command does with its arguments; it may fail with one of `FAILURES`, or for the sake of one.
        argv: default: of this process.
        status: exit status for a record.
    """
    try:
        record = main(argv)
    except Exception as error:
        if not any(isinstance(cause, FAILURES) or is_of_datasets(cause) for cause in causes(error)):
            raise
        logger.debug("a command failed", exc_info=error)
        print(f"\nerror: {plain_words(error)}", file=sys.stderr)  # below a progress bar
        sys.exit(1)
    if record is not None and os.environ.get("RANK", "0") == "0":
        print(json.dumps(record))
    sys.exit(status(record or {}))


@contextmanager
def about(subject: str) -> Iterator[None]:
    """A failure within is about this folder, repository or data set, which errors of the network do not name."""
    try:
        yield
    except Exception as error:
        error.add_note(str(subject))
        raise


def device(name: str) -> str:
    """A `--device` that there is, for argparse."""
    try:
        torch.empty(0, device=name)
    except Exception as error:  # of every kind, by the device
        raise argparse.ArgumentTypeError(f"there is no device {name!r} here ({first_line(error)})") from error
    return name


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def is_of_datasets(error: BaseException) -> bool:
    return type(error).__module__ == "datasets.exceptions"  # of which some are plain exceptions


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def plain_words(error: BaseException) -> str:
    """What went wrong in one sentence, without the token; see [`about`] for what it was about."""
    chain = causes(error)
    notes = [note for cause in chain for note in getattr(cause, "__notes__", [])]
    subject = notes[0] if notes else "what was asked for"
    response = next((cause.response for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    status = None if response is None else response.status_code
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        problem = "not accepted" if get_token() else "missing"
        sentence = (
            f"{subject} is not there for you: the Hub token is {problem}; log in with `hf auth login` or set HF_TOKEN"
        )
    elif status == 403:
        sentence = f"the Hub token may not do this to {subject}: it takes one that may write"
    elif status == 412:
        sentence = f"{subject} was changed by somebody else in the meantime; nothing was uploaded, run it again"
    elif status is not None and (status >= 500 or status == 429):
        sentence = f"the Hub failed with status {status} for {subject}; run it again, it goes on where it is needed"
    elif status is None and any(isinstance(cause, (httpx.HTTPError, ConnectionError)) for cause in chain):
        sentence = (
            f"no connection to {constants.ENDPOINT} for {subject} ({first_line(chain[-1])}); run it again, it goes on"
            " where it is needed"
        )
    elif status == 404:
        sentence = f"{subject} is not on the Hub ({first_line(error)})"
    elif any(isinstance(cause, HFValidationError) for cause in chain):
        sentence = f"{subject} is neither a folder nor a name on the Hub"
    else:
        sentence = what_it_says(chain)
        if notes and subject not in sentence:
            sentence = f"{subject}: {sentence}"
    sentence = sentence.replace(get_token() or "\n", "…")
    return re.sub(r"\bhf_\w{20,}", "…", sentence)


def what_it_says(chain: list[BaseException]) -> str:
    """The message of an error in one line, without the traceback that a data loader's worker puts before it."""
    error = chain[-1] if type(chain[0]).__name__ == "DatasetGenerationError" else chain[0]  # which says no more
    said = OF_A_WORKER.sub("", str(error)) if "Original Traceback" in str(error) else str(error)
    said = re.sub(r"^Caught \w+ in DataLoader worker process \d+\.", "", said)
    return " ".join(line.strip() for line in said.splitlines() if line.strip()) or type(error).__name__
