"""``dfq.benchmark``: speed of a checkpoint compared with other runtimes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from dfq import checkpoint as checkpoints
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.benchmarking import cold as cold_processes
from dfq.benchmarking.measuring import Measurement
from dfq.benchmarking.runtimes import RECORDED, RUNTIMES, BenchmarkInputs
from dfq.cache import cache_directory
from dfq.checkpoint import CheckpointInfo
from dfq.device import resolve_device, thread_count
from dfq.engines.sessions import TORCH
from dfq.engines.tuning import Choices, fastest
from dfq.environment import instructions, isa, processor, versions
from dfq.errors import BenchmarkError, BenchmarkInterrupt, SettingError, nearest
from dfq.extras import installed
from dfq.progress import Progress, resolve_progress, warn
from dfq.quantization.scheme import Scheme
from dfq.results.values import BenchmarkResult, BenchmarkRow, ColdStart, SkippedRuntime
from dfq.slow import slow_integers

BATCHES = (1, 16)
SECONDS = 5.0
MAX_SECONDS, MAX_TOTAL_SECONDS = 3600.0, 86400.0
MAX_BATCH, MAX_THREADS = 4096, 1024


@checked
def benchmark(
    checkpoint: str | Path,
    *,
    batch: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    total_seconds: float | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    runtimes: Sequence[str] | None = None,
    cold: bool = False,
    save: bool = False,
    cache: str | Path | None = None,
    progress: Progress | bool | None = None,
) -> BenchmarkResult:
    """Measure a checkpoint's speed, compared with the same model on other runtimes.

    ``dfq`` is the checkpoint on PyTorch; ``dfq-compiled`` is compiled by ``torch.compile``, which
    takes a minute, so it is measured only if it is named, like ``dfq-eager``, which is ``dfq``
    without CUDA graphs.  ``torch-fp32``, ``torch-fp16`` (GPUs),
    ``torch-bf16`` and ``torch-bf16-compiled`` (GPUs) run the dequantized weights in PyTorch, with
    fused attention where that is faster.  ``torchao-int8``, ``torchao-int8-int4`` (CPUs),
    ``torchao-int8-weights`` (GPUs), ``onnxruntime-int8`` and ``openvino-int8`` are that float model
    quantized by other tools (their speed is comparable, their accuracy is not);
    ``onnxruntime-dfq`` and ``openvino-dfq`` are :func:`dfq.load` with that ``runtime``.  All get
    the same random images and number of threads and take turns in one process.

    Args:
        batch: batch sizes to measure.
        seconds: time limit of all calls of a runtime at a batch size, exceeded by one call at most.
        total_seconds: time limit of the whole run; a build or call that has begun is finished.
        threads: threads of every runtime; PyTorch's number by default.
        device: ``cpu``, or a GPU, on which PyTorch's runtimes are measured alone.
        runtimes: some of them; all of the device but those that are opt-in by default.  Those that
            are not installed or cannot run the model are listed as absent.
        cold: also measure cold starts of dfq and of timm's model.
        save: record the speeds, so that ``dfq.load`` runs the checkpoint on the fastest of ``dfq``,
            ``onnxruntime-dfq`` and ``openvino-dfq`` on this machine with these threads.
        cache: cache directory of the record and the engines' files; else ``$DFQ_CACHE``, else the
            user's.  Without ``save`` nothing is kept there.

    Raises:
        BenchmarkError: a runtime of dfq's own failed; its ``result`` has the other rows.
        BenchmarkInterrupt: Ctrl-C; its ``result`` has the rows that were measured before.
        DfqError: one of its other subclasses says what is wrong.
    """
    target = resolve_device(device)
    names, batches = _names(runtimes, target), _batches(batch)
    _check_range("seconds", seconds, 0, MAX_SECONDS)
    if total_seconds is not None:
        _check_range("total_seconds", total_seconds, 0, MAX_TOTAL_SECONDS)
    threads = torch.get_num_threads() if threads is None else threads
    _check_range("threads", threads, 0, MAX_THREADS)
    _check_for_device(target, names, cold, save)
    info, digest = checkpoints.read_info(checkpoint), checkpoints.recorded_digest(checkpoint)
    progress = resolve_progress(progress)
    starts: list[ColdStart] | None = None
    saved: dict[int, str] | None = None
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="dfq-") as temporary, thread_count(threads):
        directory = Path(temporary)
        model = checkpoints.load(checkpoint, device=target)
        warn(progress, slow_integers(target, model.max_weight()))
        place = cache_directory(cache) if save else directory
        inputs = BenchmarkInputs(Path(checkpoint), model, threads, directory, place, target)
        run = Measurement(inputs, seconds, total_seconds, progress)
        try:
            run.build(names)
            for count in batches:
                run.measure(count)
            if save:
                saved = _save(run.rows, Choices(digest, place, threads, checkpoint))
            if cold:
                starts, missing = _cold(Path(checkpoint), info, inputs, progress)
                run.skipped += missing
        except KeyboardInterrupt:
            interrupted = True
            if not run.rows:
                raise
    result = BenchmarkResult(
        checkpoint=str(checkpoint),
        model=info.model,
        scheme=Scheme(info.recipe.quantization).name,
        attention=info.recipe.quantization.attention,
        backend=model.backend,
        rows=run.rows,
        absent=run.skipped,
        cold=starts,
        threads=threads,
        seconds=seconds,
        processor=processor(),
        instructions=list(instructions()),
        cores=os.cpu_count() or 1,
        versions={**versions(), **_versions()},
        device=_device_name(target),
        isa={} if interrupted or target.type != "cpu" else isa(),
        saved=saved,
        stopped="it was interrupted" if interrupted else "; ".join(run.failures) or None,
    )
    if interrupted:
        raise BenchmarkInterrupt(result)
    if run.failures:
        raise BenchmarkError(f"{run.failures[0]}. The other rows were measured.", result)
    return result


def _check_for_device(device: torch.device, names: list[str], cold: bool, save: bool) -> None:
    if device.type == "cpu":
        if save and "dfq" not in names:
            raise SettingError("save compares with 'dfq'; name it among the runtimes.")
        return
    for name, given in {"cold": cold, "save": save}.items():
        if given:
            raise SettingError(f"{name} is of the CPU; leave it out with device {str(device)!r}.")


def _save(rows: list[BenchmarkRow], choices: Choices) -> dict[int, str]:
    """Record the speeds of what :func:`dfq.load` can run; return its choice by batch size."""
    saved = {}
    for batch in dict.fromkeys(row.batch for row in rows):
        speeds = {
            RECORDED[row.runtime]: batch / row.median_ms * 1e3
            for row in rows
            if row.batch == batch and row.runtime in RECORDED and row.warm
        }
        if TORCH in speeds:
            choices.save(batch, speeds)
            saved[batch] = fastest(speeds)
    return saved


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cold(
    checkpoint: Path, info: CheckpointInfo, inputs: BenchmarkInputs, progress: Progress
) -> tuple[list[ColdStart], list[SkippedRuntime]]:
    with progress.task("Starting cold processes", 2 * cold_processes.REPEATS) as advance:
        return cold_processes.cold_starts(
            checkpoint, info, inputs.threads, inputs.directory, advance
        )


def _names(runtimes: Sequence[str] | None, device: torch.device) -> list[str]:
    here = {name: r for name, r in RUNTIMES.items() if device.type in r.devices}
    usual = [name for name, runtime in here.items() if not runtime.opt_in]
    names = usual if runtimes is None else list(dict.fromkeys(runtimes))
    for name in names:
        if name not in here:
            what = (
                f"{name!r} does not run on" if name in RUNTIMES else f"Unknown runtime {name!r} for"
            )
            raise SettingError(
                f"{what} {device.type!r}; there are {', '.join(here)}.{nearest(name, here)}"
            )
    if not names:
        raise SettingError(f"{option('runtimes')} names none; there are {', '.join(here)}.")
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


def _versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "openvino", "nncf", "torchao")
    libraries = {}
    for name in filter(installed, packages):
        with suppress(metadata.PackageNotFoundError):  # the module of another distribution
            libraries[name] = metadata.version(name)
    return libraries
