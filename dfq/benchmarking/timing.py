"""Interleaved measurement of the latencies of several runtimes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from dfq.results.values import BenchmarkRow

TURN = 0.25
"""Seconds of a turn of a runtime."""

WARM_UP = 3

Run = Callable[[], object]


def interleaved(
    runs: Mapping[str, Run], seconds: float, advance: Callable[[int], None]
) -> dict[str, list[float]]:
    """Return the seconds of every call; each runtime is timed for ``seconds``, at least twice.

    Runtimes take turns, so that temporary load of the machine affects all of them.  The first call
    of a turn is not counted, because threads of the previous runtime may still be spinning.
    """
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    turns = turns_of(seconds)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            run()
            times[name] += _turn(run, seconds / turns)
            advance(1)
    return times


def _turn(run: Run, seconds: float) -> list[float]:
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def turns_of(seconds: float) -> int:
    """Return the number of turns of each runtime."""
    return max(2, round(seconds / TURN))


def row_of(runtime: str, batch: int, times: list[float]) -> BenchmarkRow:
    """Return the throughput over all calls, and quantiles of their latency."""
    median, high = np.percentile(times, [50, 95])
    return BenchmarkRow(
        runtime=runtime,
        batch=batch,
        images_per_second=batch * len(times) / sum(times),
        median_ms=float(median) * 1e3,
        p95_ms=float(high) * 1e3,
    )
