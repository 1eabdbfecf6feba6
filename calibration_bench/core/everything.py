"""``run all``: all experiments on the demo model, several at once."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from calibration_bench.core import registry
from calibration_bench.core.notes import Lines
from calibration_bench.core.options import at_least
from calibration_bench.core.runner import run


def run_all(
    results: Path, lines: Lines, *, again: bool = False, jobs: int | None = None
) -> Iterator[dict[str, Any]]:
    """Run every experiment with ``in_all``; yield the outcome of each as it ends.

    Experiments that measure speed run first, one at a time, with all threads.  Of the others,
    ``jobs`` run at once (by default one per thread), each in its own process with an equal share
    of the threads.  After a failure no further experiment is started.

    Raises:
        SettingError: ``jobs`` is below 1.
    """
    at_least(jobs, 1, "--jobs")
    threads = torch.get_num_threads()
    at_once = min(jobs or threads, threads)
    wanted = [entry for entry in registry.ENTRIES if entry.in_all]
    single = wanted if at_once == 1 else [entry for entry in wanted if entry.alone]
    for entry in sorted(single, key=lambda entry: not entry.alone):
        yield _run(entry.name, None, results, again, lines.started)
    rest = [entry.name for entry in wanted if entry not in single]
    if not rest:
        return
    pool = ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"))
    share = threads // at_once
    ended = [pool.submit(_run, name, share, results, again, lines.started) for name in rest]
    try:
        for future in as_completed(ended):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run(
    name: str, threads: int | None, results: Path, again: bool, started: float
) -> dict[str, Any]:
    entry = registry.entry(name)
    options = entry.load().options()
    if threads is not None:
        options = dataclasses.replace(options, threads=threads)
    return run(entry, options, results, Lines(name, started), again=again)
