"""``dfq.benchmark``: the checkpoint's speed beside other runtimes'."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.benchmarking import cold as cold_processes
from dfq.benchmarking.quiet import quiet
from dfq.benchmarking.runtimes import RUNTIMES, Contestants, Predict
from dfq.benchmarking.timing import interleaved, row_of, turns_of
from dfq.checkpoint import CheckpointInfo
from dfq.device import thread_count
from dfq.environment import instructions, processor, versions
from dfq.errors import DfqError, SettingError, nearest
from dfq.extras import installed
from dfq.failures import first_line
from dfq.installation import install_command
from dfq.progress import Progress, Silent, warn
from dfq.quantization.scheme import Scheme
from dfq.results.values import Absent, BenchmarkResult, BenchmarkRow, ColdStart
from dfq.slow import slow_integers

BATCHES = (1, 16)
SECONDS = 5.0
LONGEST, LARGEST, MOST_THREADS = 3600.0, 4096, 1024


@checked
def benchmark(
    checkpoint: str | Path,
    *,
    batch: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    cold: bool = False,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure a checkpoint's speed on the CPU beside the same model on other runtimes.

    ``dfq`` is the checkpoint as loaded, ``dfq-compiled`` what ``compile`` makes of it, which
    takes a minute and so is measured only where it is named.  ``torch-fp32`` and
    ``torch-bf16`` are its dequantized weights in PyTorch with fused attention where that is
    faster.
    ``onnxruntime-int8`` and ``openvino-int8`` are that float model quantized by the runtime's
    own tools on random images (their speed is comparable, their accuracy is not);
    ``onnxruntime-dfq`` and ``openvino-dfq`` run what :func:`dfq.export` writes.  All have the
    same random images and number of threads and take turns in one process.

    Args:
        batch: numbers of images at once, each measured.
        seconds: how long each runtime is timed for each batch.
        threads: of every runtime; torch's by default.
        runtimes: some of them; all but ``dfq-compiled`` by default.  Those that are not
            installed or cannot run the model are listed as absent.
        cold: also measure processes that have loaded nothing, with timm's model beside.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    names, batches = _names(runtimes), _batches(batch)
    _within("seconds", seconds, 0, LONGEST)
    threads = torch.get_num_threads() if threads is None else threads
    _within("threads", threads, 0, MOST_THREADS)
    info = checkpoints.read_info(checkpoint)
    progress = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="dfq-") as temporary, thread_count(threads):
        model = checkpoints.load(checkpoint)
        warn(progress, slow_integers(torch.device("cpu"), model.max_weight()))
        given = Contestants(model, threads, Path(temporary))
        ready, absent = _build(names, given, progress)
        rows = [row for n in batches for row in _measure(ready, given, n, seconds, progress)]
        starts: list[ColdStart] | None = None
        if cold:
            starts, missing = _cold(Path(checkpoint), info, given, progress)
            absent += missing
    return BenchmarkResult(
        checkpoint=str(checkpoint),
        model=info.model,
        scheme=Scheme(info.recipe.quantization).name,
        attention=info.recipe.quantization.attention,
        backend=given.model.backend,
        rows=rows,
        absent=absent,
        cold=starts,
        threads=threads,
        seconds=seconds,
        processor=processor(),
        instructions=list(instructions()),
        cores=os.cpu_count() or 1,
        versions={**versions(), **_versions()},
    )


def _cold(
    checkpoint: Path, info: CheckpointInfo, given: Contestants, progress: Progress
) -> tuple[list[ColdStart], list[Absent]]:
    with progress.task("cold starts", 2 * cold_processes.REPEATS) as advance:
        return cold_processes.cold_starts(checkpoint, info, given.threads, given.directory, advance)


def _names(runtimes: Sequence[str] | None) -> list[str]:
    usual = [name for name, runtime in RUNTIMES.items() if not runtime.asked]
    names = usual if runtimes is None else list(dict.fromkeys(runtimes))
    for name in names:
        if name not in RUNTIMES:
            raise SettingError(
                f"Unknown runtime {name!r}; there are {', '.join(RUNTIMES)}."
                f"{nearest(name, RUNTIMES)}"
            )
    if not names:
        raise SettingError(f"runtimes names none; there are {', '.join(RUNTIMES)}.")
    return names


def _batches(batch: Sequence[int]) -> list[int]:
    for count in batch:
        if type(count) is not int or not 1 <= count <= LARGEST:
            raise SettingError(f"batch has {count!r}; it takes whole numbers from 1 to {LARGEST}.")
    if not batch:
        raise SettingError("batch is empty; give numbers of images, such as 1 and 16.")
    return list(dict.fromkeys(batch))


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not low < value <= high:
        raise SettingError(f"{name} is {value!r}; it is above {low:g} and at most {high:g}.")


def _build(
    names: list[str], given: Contestants, progress: Progress
) -> tuple[dict[str, Predict], list[Absent]]:
    """The runtimes that are here, and why the others are not."""
    ready: dict[str, Predict] = {}
    absent: list[Absent] = []
    with progress.task("build", len(names)) as advance:
        for name in names:
            runtime = RUNTIMES[name]
            missing = [package for package in runtime.packages if not installed(package)]
            if missing:
                reason = f"{', '.join(missing)} not installed: {install_command(runtime.extra)}"
                absent.append(Absent(name, reason))
            else:
                _build_one(name, given, ready, absent)
            advance(1)
    return ready, absent


def _build_one(
    name: str, given: Contestants, ready: dict[str, Predict], absent: list[Absent]
) -> None:
    """Other people's tools may fail in any way; that is a fact about them, not an end."""
    own = not RUNTIMES[name].packages
    try:
        with quiet():
            predict = RUNTIMES[name].build(given)
            predict(given.images(1))
        ready[name] = predict
    except DfqError as error:
        absent.append(Absent(name, str(error)))
    except Exception as error:  # whatever they raise; there is no list
        if own:
            raise
        absent.append(Absent(name, f"it failed: {first_line(error)}"))


def _measure(
    ready: dict[str, Predict], given: Contestants, batch: int, seconds: float, progress: Progress
) -> list[BenchmarkRow]:
    images = given.images(batch)
    runs: dict[str, Callable[[], Any]] = {n: partial(p, images) for n, p in ready.items()}
    with progress.task(f"batch {batch}", turns_of(seconds) * max(1, len(runs))) as advance:
        times = interleaved(runs, seconds, advance)
    return [row_of(name, batch, taken) for name, taken in times.items()]


def _versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "openvino", "nncf")
    found = {}
    for name in filter(installed, packages):
        with suppress(metadata.PackageNotFoundError):  # the module of another distribution
            found[name] = metadata.version(name)
    return found
