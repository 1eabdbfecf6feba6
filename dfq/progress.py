"""Progress of long work, as the pipeline reports it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]


@runtime_checkable
class Progress(Protocol):
    """Shows long work; the command line has bars, the API is silent by default."""

    def task(self, name: str, total: int, /) -> AbstractContextManager[Advance]:
        """A stage of ``total`` steps, as a context whose value advances it."""

    def note(self, text: str) -> None:
        """A line about what is going on."""


def note_all(progress: Progress, texts: Iterable[str]) -> None:
    """Note every text."""
    for text in texts:
        progress.note(text)


def warn(progress: Progress, warnings: Iterable[str]) -> None:
    """Note each warning."""
    for warning in warnings:
        progress.note(f"warning: {warning}")


class Silent:
    """Shows nothing."""

    def task(self, _name: str, _total: int) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass
