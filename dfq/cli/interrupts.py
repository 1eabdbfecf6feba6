"""Ctrl-C while modules load: imports of C++ code lose the signal, or abort on it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code of an interrupted command."""

MESSAGE = "Interrupted."


def end_at_once() -> None:
    """From now on Ctrl-C ends the process with a message, wherever it is.

    Right while nothing is under way that has to be put away first.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_with_json() -> None:
    """From now on the process that Ctrl-C ends also writes the error that ``--json`` promises.

    Before the arguments are parsed there is the message alone.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _end_with_json)


def raise_again() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) in (_end, _end_with_json):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> NoReturn:
    _write(2, MESSAGE)
    os._exit(INTERRUPTED)


def _end_with_json(*_: Any) -> NoReturn:
    error = {"error": {"type": "KeyboardInterrupt", "message": MESSAGE}}
    _write(1, json.dumps(error, indent=2))
    _end()


def _write(descriptor: int, line: str) -> None:
    with suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())
