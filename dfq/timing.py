"""Interleaved measurement of the latencies of several functions, within a time limit each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

TURN = 0.25
"""Seconds of a turn of a function."""

WARM_UP = 3
"""Largest number of calls before the first turn."""

MIN_TURNS = 2

Run = Callable[[], object]


class Sampler:
    """Latencies of one function, with ``seconds`` for all of its calls.

    No call begins after that time, so it is exceeded by one call at most.

    ``times``: seconds of the counted calls.  ``warm``: whether calls that are not counted came
    before them; False for a function whose first call left no time for another one, which is then
    the only one in ``times``.  ``failure``: what the function raised; it is not called again.
    """

    def __init__(self, run: Run, seconds: float) -> None:
        self.times: list[float] = []
        self.warm = True
        self.failure: Exception | None = None
        self._run, self._left, self._turn_seconds = run, seconds, seconds / turns_of(seconds)
        self._latest = 0.0

    def warm_up(self) -> None:
        """Call the function up to ``WARM_UP`` times, fewer if they are slow."""
        for _ in range(WARM_UP):
            self._call()
            if self._left <= 2 * self._latest:
                break
        if self._left <= 0 and self.failure is None:
            self.times, self.warm = [self._latest], False

    def turn(self) -> None:
        """Count calls for a turn.

        The first call of a turn is not counted, because threads of the previous function may still
        be spinning; calls that are longer than a turn are all counted, as that hardly affects them.
        """
        if self._latest < TURN and self._left > 0:
            self._call()
        end = self._left - self._turn_seconds
        while self.failure is None and (not self.times or self._left > max(end, 0)):
            self._call()
            if self.failure is None:
                self.times.append(self._latest)

    def _call(self) -> None:
        start = time.perf_counter()
        try:
            self._run()
        except Exception as error:  # of any runtime
            self.failure, self._left = error, 0.0
        self._latest = time.perf_counter() - start
        self._left -= self._latest


def interleave(samplers: Sequence[Sampler], seconds: float, advance: Callable[[int], None]) -> None:
    """Measure functions in turns, so that temporary load of the machine affects all of them.

    ``advance`` is called with 1 after every turn of a function, ``turns_of(seconds)`` times each.
    """
    for sampler in samplers:
        sampler.warm_up()
    for _ in range(turns_of(seconds)):
        for sampler in samplers:
            sampler.turn()
            advance(1)


def turns_of(seconds: float) -> int:
    """Return the number of turns of each function."""
    return max(MIN_TURNS, round(seconds / TURN))
