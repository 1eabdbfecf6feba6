"""Peak memory of one inversion pass, measured in its own process.

``python -m calibration_bench.core.memory`` reads a request from stdin and prints the result, both
as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from calibration_bench.measure import ours
from calibration_bench.measure.measure import PeakMemory
from calibration_bench.measure.methods import Method, random_model
from calibration_bench.measure.official import Official
from dfq.errors import RunError

EACH = 2
"""Iterations of each stage; few are enough, as the first stage uses the most memory."""


def peak(request: dict[str, Any]) -> dict[str, Any]:
    """Measure in a new process; see :func:`measure` for ``request`` and result.

    Raises:
        RunError: the process failed, for example out of memory.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "calibration_bench.core.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"Measuring memory failed (exit {done.returncode}): {last:.200}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory in MB above the loaded float32 model, and of the whole process.

    ``request`` has ``implementation``, ``model``, ``method``, ``images``, ``precision``,
    ``threads``, ``seed``, ``device`` and, for official ones, ``official``.
    """
    torch.set_num_threads(request["threads"])
    method = Method(request["method"])
    trajectories = method.trajectories(request["images"])
    long = method.settings(
        unit_size=trajectories,
        precision=request["precision"],
        threads=request["threads"],
        seed=request["seed"],
    )
    settings, device = method.short(long, EACH), request["device"]
    if request["implementation"] == "dfq":
        loaded = random_model(request["model"], request["seed"])
        memory = PeakMemory(device)
        ours.run(loaded, settings, device)
    else:
        checkout, frozen = Path(request["official"]), request["implementation"] != "official"
        code = Official(checkout, request["model"], request["seed"], trajectories, device)
        memory = PeakMemory(device)
        code.run(settings, frozen=frozen)
    return _result(memory, trajectories)


def _result(memory: PeakMemory, trajectories: int) -> dict[str, Any]:
    highest = memory.peak()
    return {
        "peak_memory_mb": highest - memory.before,
        "process_peak_mb": highest,
        "memory_trajectories": trajectories,
        "memory_reset": memory.reset,
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = measure(json.load(sys.stdin))
    print(json.dumps(measured))
