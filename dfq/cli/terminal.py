"""What people see: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dfq.cli.interrupts import raise_again
from dfq.errors import OutputError
from dfq.text import escape

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


def is_first() -> bool:
    """Whether this process speaks for all that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def check_output(*, json: bool, quiet: bool) -> None:
    """Refuse a closed stdout before any work, unless nothing is to be printed.

    Raises:
        OutputError: standard output is closed.
    """
    if json or not quiet:
        _stdout()
    elif sys.stdout is None:
        sys.stdout = io.StringIO()  # for libraries that print


def print_json(value: Any) -> None:
    """One JSON value on stdout; raises :class:`OutputError` if it cannot be written."""
    stdout = _stdout()
    stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    stdout.flush()


def print_text(text: Any, **options: Any) -> None:
    """Text or a table on stdout; raises :class:`OutputError` if it cannot be written."""
    stdout = _stdout()
    out_console.print(text, **options)
    stdout.flush()


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise OutputError(
            "Standard output is closed, and the result is printed there; redirect it to a file "
            "or to the null device, or use --quiet."
        )
    return sys.stdout


class Shown:
    """Progress for people: bars on a terminal, plain lines elsewhere, on stderr.

    Long work begins with it, so that Ctrl-C is no longer one of a program that loads.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        raise_again()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        if self.quiet:
            yield lambda _: None
        elif err_console.is_terminal:
            with RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=err_console,
                transient=True,
            ) as bars:
                bar = bars.add_task(name, total=total)
                yield lambda n: bars.advance(bar, n)
        else:
            err_console.print(f"{name}: {total} steps")
            tenth = _Tenths(name, total)
            yield tenth

    def note(self, text: str) -> None:
        if not self.quiet:
            err_console.print(escape(text))


class _Tenths:
    """Prints a line at every tenth of the work."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0

    def __call__(self, steps: int) -> None:
        before, self.done = self.done, self.done + steps
        if before * 10 // self.total != self.done * 10 // self.total:
            err_console.print(f"{self.name}: {self.done}/{self.total}")
