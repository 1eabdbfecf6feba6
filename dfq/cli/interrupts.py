"""Handling of Ctrl-C while modules load: imports of C++ code lose the signal, or abort on it."""

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
    """Make Ctrl-C end the process at once, with a message.

    Only for the time before any work that needs cleaning up.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_with_json() -> None:
    """Make Ctrl-C also write the JSON object of ``--json`` before it ends the process.

    Until this is called there is only the message.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _end_with_json)


def raise_once() -> None:
    """Make Ctrl-C raise KeyboardInterrupt, and ignore another one while the command cleans up."""
    if signal.getsignal(signal.SIGINT) in (_end, _end_with_json):
        signal.signal(signal.SIGINT, _raise)


def ignore() -> None:
    """Ignore Ctrl-C from now on: the command has ended, and its exit code stands."""
    if signal.getsignal(signal.SIGINT) in (_end, _end_with_json, _raise):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _raise(*_: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


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
