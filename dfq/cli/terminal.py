"""What people see: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def wants_json() -> bool:
    """Whether the command was called with ``--json``."""
    return "--json" in sys.argv[1:]


def print_json(value: Any) -> None:
    """One JSON value on stdout; raises :class:`OutputError` if it cannot be written."""
    with _stdout():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_text(text: Any, **options: Any) -> None:
    """Text or a table on stdout; raises :class:`OutputError` if it cannot be written."""
    with _stdout():
        out_console.print(text, **options)


@contextmanager
def _stdout() -> Iterator[None]:
    """Raise :class:`OutputError` if what is printed cannot be written, as on a full disk."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"Cannot write to standard output: {error.strerror}.") from error


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
