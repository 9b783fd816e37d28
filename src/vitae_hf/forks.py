# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Workers that are forked while another thread asks the Hub, as happens over streamed data, do not hang.

huggingface_hub closes its HTTP client in every forked child, for which the client takes a lock. If another thread of
the parent held that lock, nobody gives it back in the child. So that client is not closed there: the child makes one of
its own when it needs one.
"""

import os
from typing import Any

from huggingface_hub.utils import _http


def client() -> Any:
    """What huggingface_hub asks the Hub with; none before it has asked anything."""
    return getattr(_http, "_GLOBAL_CLIENT", None)


def keep_open() -> None:
    """Before a fork: closing the client does nothing, in the child for good."""
    if (asking := client()) is not None:
        asking.close = lambda: None


def let_close() -> None:
    """In the parent, after a fork: closing the client closes it."""
    if (asking := client()) is not None:
        vars(asking).pop("close", None)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(before=keep_open, after_in_parent=let_close)
