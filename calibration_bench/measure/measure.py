"""Times of iterations, and peak memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

MB = 1e6


class Stopwatch:
    """Callback that records the time in seconds, after the device has finished."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.moments: list[float] = []

    def __call__(self, _: int = 1) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.moments.append(time.perf_counter())


@dataclass(frozen=True)
class Trace:
    """Seconds of every iteration of a run, and of the work after the last (``tail``).

    The last iteration of a stage may include the selection of patches.  ``lengths``: number of
    iterations of each stage.
    """

    iterations: tuple[float, ...]
    tail: float
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, moments: Sequence[float], lengths: Sequence[int]) -> Trace:
        """Compute from the times of the start, the end of each iteration, and the end."""
        steps = tuple(b - a for a, b in itertools.pairwise(moments))
        if len(steps) != sum(lengths) + 1:
            raise ValueError(f"{len(steps) - 1} iterations were timed, not {sum(lengths)}")
        return cls(steps[:-1], steps[-1], tuple(lengths))

    def stages(self) -> list[tuple[float, ...]]:
        """Return the seconds of the iterations of each stage."""
        parts, start = [], 0
        for length in self.lengths:
            parts.append(self.iterations[start : start + length])
            start += length
        return parts


@dataclass
class Stages:
    """Short runs of the same stages, from which a full run is extrapolated."""

    warmup: int
    traces: list[Trace] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Return the median seconds per iteration of each stage, without its first ``warmup``."""
        runs = [trace.stages() for trace in self.traces]
        return [
            statistics.median([t for stage in same for t in stage[self.warmup :]])
            for same in zip(*runs, strict=True)
        ]

    def timed(self) -> int:
        """Return the number of timed iterations of each stage."""
        return sum(trace.lengths[0] - self.warmup for trace in self.traces)

    def spread(self) -> float:
        """Return the largest interquartile range / median of a stage: the noise of the machine."""
        runs = [trace.stages() for trace in self.traces]
        spreads = []
        for same in zip(*runs, strict=True):
            times = [t for stage in same for t in stage[self.warmup :]]
            if len(times) > 1:
                low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
                spreads.append((high - low) / middle)
        return max(spreads, default=0.0)

    def overhead(self) -> float:
        """Return the median seconds of a run outside its iterations: start, selection of patches,
        assembly of images."""
        typical = self.seconds()
        return statistics.median(
            trace.tail
            + sum(
                max(0.0, stage[0] - usual)
                for stage, usual in zip(trace.stages(), typical, strict=True)
            )
            for trace in self.traces
        )

    def predict(self, lengths: Sequence[int]) -> float:
        """Return the predicted seconds of a run with stages of these lengths."""
        typical = zip(self.seconds(), lengths, strict=True)
        return self.overhead() + sum(seconds * length for seconds, length in typical)


class PeakMemory:
    """Peak memory of this process since the object was created, in MB (10^6 bytes).

    On CUDA: memory allocated by PyTorch.  On a CPU: peak resident memory; the kernel's high-water
    mark is reset if that is permitted, else it is the peak since the process started, and
    ``reset`` is False.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.reset, self.before = True, torch.cuda.memory_allocated(self.device) / MB
            return
        _give_back()
        self.reset = _reset_high_water()
        self.before = _status("VmRSS") if self.reset else _lifetime_peak()

    def peak(self) -> float:
        """Return the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MB
        return _status("VmHWM") if self.reset else _lifetime_peak()


def _give_back() -> None:
    """Return freed memory to the system, so that it does not count."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") <= 1.02 * _status("VmRSS")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"/proc/self/status has no {name}")


def _lifetime_peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
