"""Progress of long work, as the pipeline reports it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from dfq.job import Stage

Advance = Callable[[int], None]


@runtime_checkable
class Progress(Protocol):
    """Interface of progress of long work.

    Public functions take an object with these two methods, ``True`` for the bars of the command
    line, or ``False`` or None for none.  If it also has a method ``announce``, that gets the
    :class:`~dfq.job.Stage` list of a job with several stages before the first one.
    """

    def task(self, name: str, total: int, /) -> AbstractContextManager[Advance]:
        """Show a task of ``total`` steps; the value of the context manager advances it."""

    def note(self, text: str) -> None:
        """Show a line of text."""


@runtime_checkable
class Announced(Protocol):
    """Progress that receives the stages of a job."""

    def announce(self, stages: Sequence[Stage], /) -> None:
        """Receive the coming stages in their order; some may be skipped."""


def resolve_progress(progress: Progress | bool | None) -> Progress:
    """Convert the argument ``progress``: bars for True, none for False and None.

    Of the processes that ``torchrun`` started, only the first has bars.
    """
    if progress is True and is_first():
        from dfq.bars import Bars

        return Bars()
    return Silent() if progress is None or isinstance(progress, bool) else progress


def is_first() -> bool:
    """Whether this process shows progress: the first of those that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def announce(progress: Progress, stages: Sequence[Stage]) -> None:
    """Pass the stages of a job to progress that receives them."""
    if isinstance(progress, Announced):
        progress.announce(stages)


def note_all(progress: Progress, texts: Iterable[str]) -> None:
    """Note every text."""
    for text in texts:
        progress.note(text)


def warn(progress: Progress, warnings: Iterable[str]) -> None:
    """Note each warning."""
    for warning in warnings:
        progress.note(f"warning: {warning}")


class Silent:
    """Progress that shows nothing."""

    def task(self, _name: str, _total: int) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass
