"""Ctrl-C while modules load: imports of C++ code lose the signal, or abort on it."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

INTERRUPTED = 130


def end_at_once() -> None:
    """From now on Ctrl-C ends the process with a message, wherever it is.

    Right while nothing is under way that has to be put away first.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> NoReturn:
    message = "Interrupted."
    if "--json" in sys.argv[1:]:
        error = {"error": {"type": "KeyboardInterrupt", "message": message}}
        _write(1, json.dumps(error, indent=2))
    _write(2, message)
    os._exit(INTERRUPTED)


def _write(descriptor: int, line: str) -> None:
    with suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())
