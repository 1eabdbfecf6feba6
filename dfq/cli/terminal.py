"""Output: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import io
import json
import sys
from typing import Any, TextIO

from rich.console import Console

from dfq.bars import Bars
from dfq.cli.interrupts import raise_once
from dfq.errors import OutputError
from dfq.progress import Progress, Silent

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


def check_output(*, json: bool, quiet: bool) -> None:
    """Check that stdout is open, before any work, unless nothing will be printed.

    Raises:
        OutputError: standard output is closed.
    """
    if json or not quiet:
        _stdout()
    elif sys.stdout is None:
        sys.stdout = io.StringIO()  # for libraries that print


def print_json(value: Any) -> None:
    """Print a JSON value on stdout; raises :class:`OutputError` if it cannot be written."""
    stdout = _stdout()
    stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    stdout.flush()


def print_text(text: Any, **options: Any) -> None:
    """Print text or a table on stdout; raises :class:`OutputError` if it cannot be written."""
    stdout = _stdout()
    out_console.print(text, **options)
    stdout.flush()


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise OutputError(
            "Standard output is closed, so the result cannot be printed; redirect it to a file or "
            "to the null device, or use --quiet."
        )
    return sys.stdout


def shown(quiet: bool) -> Progress:
    """Return the progress of a command, on stderr.

    Called when long work begins; from then on Ctrl-C raises KeyboardInterrupt.
    """
    raise_once()
    return Silent() if quiet else Bars(err_console)
