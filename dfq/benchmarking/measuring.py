"""Building and measuring runtimes within time limits; what is finished is kept."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from torch import Tensor

from dfq.benchmarking.quiet import quiet
from dfq.benchmarking.runtimes import RUNTIMES, BenchmarkInputs, Predict, Runtime
from dfq.errors import DfqError
from dfq.extras import installed
from dfq.failures import first_line
from dfq.installation import install_command
from dfq.progress import Progress
from dfq.results.values import BenchmarkRow, SkippedRuntime
from dfq.timing import Sampler, interleave, turns_of


class Measurement:
    """Rows of a benchmark as they are measured.

    ``seconds``: limit of each runtime and batch size, ``total_seconds`` of all of them; what has
    begun is finished.  ``failures``: runtimes of dfq's own that failed, with the reason.
    """

    def __init__(
        self,
        inputs: BenchmarkInputs,
        seconds: float,
        total_seconds: float | None,
        progress: Progress,
    ) -> None:
        self.rows: list[BenchmarkRow] = []
        self.skipped: list[SkippedRuntime] = []
        self.failures: list[str] = []
        self._inputs, self._seconds, self._total = inputs, seconds, total_seconds
        self._end = time.monotonic() + (float("inf") if total_seconds is None else total_seconds)
        self._progress = progress
        self._ready: dict[str, Predict] = {}

    def build(self, names: list[str]) -> None:
        """Build the runtimes that run here; each is tried on one image."""
        with self._progress.task("Building", len(names)) as advance:
            for name in names:
                reason = self._missing(RUNTIMES[name]) or self._too_late()
                if reason is None:
                    self._build(name)
                else:
                    self._skip(name, reason)
                advance(1)

    def measure(self, batch: int) -> None:
        """Measure the runtimes that were built; rows are added even if it is interrupted."""
        images = self._inputs.images(batch)
        runs = {}
        for name, predict in self._ready.items():
            run = partial(self._run, predict, images)
            if self._prepare(name, run, batch):
                runs[name] = run
        seconds = self._share_of_time(len(runs))
        samplers = {name: Sampler(run, seconds) for name, run in runs.items()}
        try:
            steps = turns_of(seconds) * max(1, len(runs))
            with self._progress.task(f"Measuring batch {batch}", steps) as advance:
                interleave(list(samplers.values()), seconds, advance)
        finally:
            for name, sampler in samplers.items():
                self._finish(name, batch, sampler)

    def _run(self, predict: Predict, images: Tensor) -> None:
        predict(images)
        self._inputs.wait()

    def _missing(self, runtime: Runtime) -> str | None:
        missing = [package for package in runtime.packages if not installed(package)]
        if not missing:
            return None
        return f"{', '.join(missing)} not installed: {install_command(runtime.extra)}"

    def _build(self, name: str) -> None:
        try:
            with quiet():
                predict = RUNTIMES[name].build(self._inputs)
                self._run(predict, self._inputs.images(1))
        except Exception as error:  # other tools document no list of errors
            self._fail(name, error)
        else:
            self._ready[name] = predict

    def _prepare(self, name: str, run: partial[None], batch: int) -> bool:
        """Compile for this batch size where the runtime does; return whether it can be measured."""
        reason = self._too_late()
        if reason is not None:
            self._skip(name, reason, batch)
            return False
        try:
            if RUNTIMES[name].compiles:
                with quiet():
                    run()
        except Exception as error:  # as above
            self._fail(name, error, batch)
            return False
        return True

    def _finish(self, name: str, batch: int, sampler: Sampler) -> None:
        if sampler.failure is not None:
            self._fail(name, sampler.failure, batch)
        elif sampler.times:
            self.rows.append(row_of(name, batch, sampler.times, sampler.warm))

    def _fail(self, name: str, error: Exception, batch: int | None = None) -> None:
        reason = str(error) if isinstance(error, DfqError) else f"it failed: {first_line(error)}"
        self._skip(name, reason, batch)
        if not RUNTIMES[name].packages:
            at = "" if batch is None else f" at batch {batch}"
            self.failures.append(f"{name}{at}: {first_line(error)}")

    def _skip(self, name: str, reason: str, batch: int | None = None) -> None:
        self.skipped.append(SkippedRuntime(name, reason, batch))

    def _too_late(self) -> str | None:
        if time.monotonic() < self._end:
            return None
        return f"the time of the whole run ({self._total:g} s) was over"

    def _share_of_time(self, count: int) -> float:
        """Seconds for each of so many runtimes."""
        left = max(self._end - time.monotonic(), 1e-3)
        return min(self._seconds, left / max(1, count))


def row_of(runtime: str, batch: int, times: list[float], warm: bool = True) -> BenchmarkRow:
    """Return the throughput over all calls, and quantiles of their latency."""
    median, high = np.percentile(times, [50, 95])
    return BenchmarkRow(
        runtime=runtime,
        batch=batch,
        images_per_second=batch * len(times) / sum(times),
        median_ms=float(median) * 1e3,
        p95_ms=float(high) * 1e3,
        calls=len(times),
        warm=warm,
    )
