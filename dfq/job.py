"""Stages of a long job, and the time that it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNITS = {
    "Inverting": "iterations",
    "Calibrating": "images",
    "Quantizing": "layers",
    "Reconstructing": "blocks",
    "Comparing": "images",
    "Evaluating": "images",
    "Training": "steps",
    "Building": "runtimes",
    "Measuring": "turns",
    "Starting": "processes",
}
"""What a task counts, by the first word of its name."""

MIN_SHARE, MIN_SECONDS = 0.05, 1.0
"""Share of a task and seconds of its work before which its speed is unknown."""


def unit_of(task: str) -> str:
    """Return what a task of that name counts."""
    return UNITS.get(task.partition(" ")[0], "steps")


@dataclass(frozen=True)
class Stage:
    """Stage of a job.

    ``task``: first word of its task's name.  ``work``: its share of work of a kind that stages have
    in common, such as passes of an image; 0 where it is of another kind, or unknown.
    """

    task: str
    work: float


@dataclass(frozen=True)
class Remaining:
    """Remaining time in seconds; ``exact`` unless it is only a lower bound."""

    seconds: float
    exact: bool


class Timer:
    """Elapsed and remaining time of one task of ``total`` steps."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._clock, self._started = clock, clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the task began."""
        return self._clock() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds left at the speed so far; None while that is unknown."""
        share, elapsed = self.done / max(1, self.total), self.elapsed
        if share < MIN_SHARE or elapsed < MIN_SECONDS:
            return None
        return elapsed * max(0.0, 1 - share) / share


class Job:
    """Time of several stages, of which some may be skipped.

    Stages to come are assumed to take as many seconds for their work as those before.  Some have
    work that is unknown, so the sum is a lower bound until the last stage.
    """

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self.stages = tuple(stages)
        self.number = 0
        self._work, self._seconds = 0.0, 0.0
        self._timer: Timer | None = None

    def start(self, task: str, timer: Timer) -> None:
        """Begin the next stage of that name; a task that is no stage changes nothing."""
        verb = task.partition(" ")[0]
        later = range(self.number, len(self.stages))
        index = next((i for i in later if self.stages[i].task == verb), None)
        if index is not None:
            self.number, self._timer = index + 1, timer

    def finish(self) -> None:
        """End the current stage."""
        if self._timer is not None:
            work = self.stages[self.number - 1].work
            self._work += work
            self._seconds += self._timer.elapsed if work else 0.0
            self._timer = None

    @property
    def position(self) -> str | None:
        """``stage k of n``; None outside of stages, and of a job with one."""
        if self._timer is None or len(self.stages) < 2:
            return None
        return f"stage {self.number} of {len(self.stages)}"

    @property
    def remaining(self) -> Remaining | None:
        """Time left of all stages; None while the speed of the current one is unknown."""
        if self._timer is None or self._timer.remaining is None:
            return None
        later = self.stages[self.number :]
        if not later:
            return Remaining(self._timer.remaining, exact=True)
        share = self._timer.done / max(1, self._timer.total)
        own = self.stages[self.number - 1].work
        work = self._work + own * share
        seconds = self._seconds + (self._timer.elapsed if own else 0.0)
        per_work = seconds / work if work else 0.0
        return Remaining(
            self._timer.remaining + per_work * sum(stage.work for stage in later), exact=False
        )
