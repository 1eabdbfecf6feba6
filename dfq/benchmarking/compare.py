"""``dfq.benchmark``: speed of a checkpoint compared with other runtimes."""

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
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.benchmarking import cold as cold_processes
from dfq.benchmarking.quiet import quiet
from dfq.benchmarking.runtimes import RUNTIMES, BenchmarkInputs, Predict
from dfq.benchmarking.timing import interleaved, row_of, turns_of
from dfq.checkpoint import CheckpointInfo
from dfq.device import thread_count
from dfq.environment import instructions, processor, versions
from dfq.errors import DfqError, SettingError, nearest
from dfq.extras import installed
from dfq.failures import first_line
from dfq.installation import install_command
from dfq.progress import Progress, resolve_progress, warn
from dfq.quantization.scheme import Scheme
from dfq.results.values import BenchmarkResult, BenchmarkRow, ColdStart, SkippedRuntime
from dfq.slow import slow_integers

BATCHES = (1, 16)
SECONDS = 5.0
MAX_SECONDS, MAX_BATCH, MAX_THREADS = 3600.0, 4096, 1024


@checked
def benchmark(
    checkpoint: str | Path,
    *,
    batch: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    cold: bool = False,
    progress: Progress | bool | None = None,
) -> BenchmarkResult:
    """Measure a checkpoint's speed on the CPU, compared with the same model on other runtimes.

    ``dfq`` is the checkpoint as loaded; ``dfq-compiled`` is compiled by ``torch.compile``, which
    takes a minute, so it is measured only if it is named.  ``torch-fp32`` and ``torch-bf16`` run
    the dequantized weights in PyTorch, with fused attention where that is faster.
    ``onnxruntime-int8`` and ``openvino-int8`` are that float model quantized by the runtime's
    own tools on random images (their speed is comparable, their accuracy is not);
    ``onnxruntime-dfq`` and ``openvino-dfq`` run what :func:`dfq.export` writes.  All get the
    same random images and number of threads and take turns in one process.

    Args:
        batch: batch sizes to measure.
        seconds: duration of the measurement of each runtime and batch size.
        threads: threads of every runtime; PyTorch's number by default.
        runtimes: some of them; all but ``dfq-compiled`` by default.  Those that are not
            installed or cannot run the model are listed as absent.
        cold: also measure cold starts of dfq and of timm's model.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    names, batches = _names(runtimes), _batches(batch)
    _check_range("seconds", seconds, 0, MAX_SECONDS)
    threads = torch.get_num_threads() if threads is None else threads
    _check_range("threads", threads, 0, MAX_THREADS)
    info = checkpoints.read_info(checkpoint)
    progress = resolve_progress(progress)
    with tempfile.TemporaryDirectory(prefix="dfq-") as temporary, thread_count(threads):
        model = checkpoints.load(checkpoint)
        warn(progress, slow_integers(torch.device("cpu"), model.max_weight()))
        inputs = BenchmarkInputs(model, threads, Path(temporary))
        ready, skipped = _build(names, inputs, progress)
        rows = [row for n in batches for row in _measure(ready, inputs, n, seconds, progress)]
        starts: list[ColdStart] | None = None
        if cold:
            starts, missing = _cold(Path(checkpoint), info, inputs, progress)
            skipped += missing
    return BenchmarkResult(
        checkpoint=str(checkpoint),
        model=info.model,
        scheme=Scheme(info.recipe.quantization).name,
        attention=info.recipe.quantization.attention,
        backend=inputs.model.backend,
        rows=rows,
        absent=skipped,
        cold=starts,
        threads=threads,
        seconds=seconds,
        processor=processor(),
        instructions=list(instructions()),
        cores=os.cpu_count() or 1,
        versions={**versions(), **_versions()},
    )


def _cold(
    checkpoint: Path, info: CheckpointInfo, inputs: BenchmarkInputs, progress: Progress
) -> tuple[list[ColdStart], list[SkippedRuntime]]:
    with progress.task("Starting cold processes", 2 * cold_processes.REPEATS) as advance:
        return cold_processes.cold_starts(
            checkpoint, info, inputs.threads, inputs.directory, advance
        )


def _names(runtimes: Sequence[str] | None) -> list[str]:
    usual = [name for name, runtime in RUNTIMES.items() if not runtime.opt_in]
    names = usual if runtimes is None else list(dict.fromkeys(runtimes))
    for name in names:
        if name not in RUNTIMES:
            raise SettingError(
                f"Unknown runtime {name!r}; there are {', '.join(RUNTIMES)}."
                f"{nearest(name, RUNTIMES)}"
            )
    if not names:
        raise SettingError(f"{option('runtimes')} names none; there are {', '.join(RUNTIMES)}.")
    return names


def _batches(batch: Sequence[int]) -> list[int]:
    for count in batch:
        if type(count) is not int or not 1 <= count <= MAX_BATCH:
            raise SettingError(
                f"{option('batch')} has {count!r}; it takes whole numbers from 1 to {MAX_BATCH}."
            )
    if not batch:
        raise SettingError(f"{option('batch')} is empty; give numbers of images, such as 1 and 16.")
    return list(dict.fromkeys(batch))


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not low < value <= high:
        raise SettingError(
            f"{option(name)} is {value!r}; it is above {low:g} and at most {high:g}."
        )


def _build(
    names: list[str], inputs: BenchmarkInputs, progress: Progress
) -> tuple[dict[str, Predict], list[SkippedRuntime]]:
    """Build the runtimes; return those that run, and those that do not with the reason."""
    ready: dict[str, Predict] = {}
    skipped: list[SkippedRuntime] = []
    with progress.task("Building", len(names)) as advance:
        for name in names:
            runtime = RUNTIMES[name]
            missing = [package for package in runtime.packages if not installed(package)]
            if missing:
                reason = f"{', '.join(missing)} not installed: {install_command(runtime.extra)}"
                skipped.append(SkippedRuntime(name, reason))
            else:
                _build_one(name, inputs, ready, skipped)
            advance(1)
    return ready, skipped


def _build_one(
    name: str, inputs: BenchmarkInputs, ready: dict[str, Predict], skipped: list[SkippedRuntime]
) -> None:
    """Build one runtime; any failure of another tool is recorded, not raised."""
    own = not RUNTIMES[name].packages
    try:
        with quiet():
            predict = RUNTIMES[name].build(inputs)
            predict(inputs.images(1))
        ready[name] = predict
    except DfqError as error:
        skipped.append(SkippedRuntime(name, str(error)))
    except Exception as error:  # other tools document no list of errors
        if own:
            raise
        skipped.append(SkippedRuntime(name, f"it failed: {first_line(error)}"))


def _measure(
    ready: dict[str, Predict],
    inputs: BenchmarkInputs,
    batch: int,
    seconds: float,
    progress: Progress,
) -> list[BenchmarkRow]:
    images = inputs.images(batch)
    runs: dict[str, Callable[[], Any]] = {n: partial(p, images) for n, p in ready.items()}
    with progress.task(
        f"Measuring batch {batch}", turns_of(seconds) * max(1, len(runs))
    ) as advance:
        times = interleaved(runs, seconds, advance)
    return [row_of(name, batch, taken) for name, taken in times.items()]


def _versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "openvino", "nncf")
    found = {}
    for name in filter(installed, packages):
        with suppress(metadata.PackageNotFoundError):  # the module of another distribution
            found[name] = metadata.version(name)
    return found
