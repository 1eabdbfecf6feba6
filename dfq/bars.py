"""Progress for people: bars on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dfq.job import Job, Stage, Timer, unit_of
from dfq.text import clock_time, escape, printable

WIDE = 76
"""Columns from which a task's name, bar, count and times share a line."""

REFRESHES = 10
"""How often a bar is drawn per second."""

BAR = 20
"""Smallest width of a bar in columns."""


class Bars:
    """Progress on a console, standard error by default."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._job = Job()

    def announce(self, stages: Sequence[Stage]) -> None:
        """Take the stages of the job that begins."""
        self._job = Job(stages)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a task of ``total`` steps; the context's value advances it."""
        timer = Timer(total)
        self._job.start(name, timer)
        try:
            with (self._bar if _is_drawable(self.console) else self._lines)(name, timer) as advance:
                yield advance
        finally:
            self._job.finish()

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape(text))

    @contextmanager
    def _bar(self, name: str, timer: Timer) -> Iterator[Callable[[int], None]]:
        def lines() -> RenderableType:
            return Group(*drawn(name, timer, self._job, self.console.width))

        with Live(
            get_renderable=lines,
            console=self.console,
            transient=True,
            refresh_per_second=REFRESHES,
        ):
            yield _advancing(timer)

    @contextmanager
    def _lines(self, name: str, timer: Timer) -> Iterator[Callable[[int], None]]:
        lines = Lines(name, timer, self._job)
        self.console.print(escape(lines.first()))

        def advance(steps: int) -> None:
            line = lines.advance(steps)
            if line is not None:
                self.console.print(escape(line))

        yield advance


def _is_drawable(console: Console) -> bool:
    """Whether lines can be drawn over."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _advancing(timer: Timer) -> Callable[[int], None]:
    def advance(steps: int) -> None:
        timer.done += steps

    return advance


class Lines:
    """Plain lines of a task: one at its start and one at every tenth of its steps."""

    def __init__(self, name: str, timer: Timer, job: Job) -> None:
        self.name, self.timer, self.job = name, timer, job

    def first(self) -> str:
        """Return the line of the start."""
        position = self.job.position
        place = f" ({position})" if position else ""
        return f"{self.name}: {self.timer.total} {unit_of(self.name)}{place}"

    def advance(self, steps: int) -> str | None:
        """Return the line of the tenth that these steps complete, if they do."""
        timer = self.timer
        before, timer.done = timer.done, timer.done + steps
        if before * 10 // timer.total == timer.done * 10 // timer.total:
            return None
        return f"{self.name}: {', '.join([counted(self.name, timer), *times(timer, self.job)])}"


def counted(name: str, timer: Timer) -> str:
    """Return how many steps of a task are done."""
    return f"{timer.done}/{timer.total} {unit_of(name)}"


def times(timer: Timer, job: Job) -> list[str]:
    """Return the task's elapsed and remaining time, and the remaining time of the job."""
    texts, left = [clock_time(timer.elapsed)], timer.remaining
    if left is not None and timer.done < timer.total:
        texts.append(f"{clock_time(left)} left")
    whole = job.remaining
    if whole is not None and not whole.exact:
        texts.append(f"in all at least {clock_time(whole.seconds)} left")
    return texts


def drawn(name: str, timer: Timer, job: Job, width: int) -> Iterator[RenderableType]:
    """Yield the lines of a task's bar for a console of ``width`` columns."""
    name = printable(name)
    bar = ProgressBar(total=max(1, timer.total), completed=timer.done)
    own, *rest = _own_and_job(timer, job)
    count = f"{counted(name, timer)}  {own}"
    if width >= WIDE:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(ratio=1, min_width=BAR)
        table.add_column(no_wrap=True)
        table.add_row(Text(name), bar, Text(count))
        yield table
    else:
        yield _line(name)
        yield _line(count)
        table = Table.grid(expand=True)
        table.add_row(bar)
        yield table
    for text in rest:
        yield _line(text)


def _own_and_job(timer: Timer, job: Job) -> list[str]:
    own, *rest = times(timer, job)
    whole = [text for text in rest if text.startswith("in all")]
    left = [text for text in rest if text not in whole]
    position = [job.position] if job.position else []
    line = ", ".join([*position, *whole])
    return [", ".join([own, *left]), *([line] if line else [])]


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
