"""Cold starts: time and memory from the start of a process to its first prediction."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import nn

from dfq import demo
from dfq.checkpoint import CheckpointInfo
from dfq.errors import RunError
from dfq.results.values import ColdStart, SkippedRuntime
from dfq.vit.describe import describe
from dfq.vit.options import matching_pool_keywords

REPEATS = 3

PEAK = """
def peak():
    try:
        lines = open("/proc/self/status").read().splitlines()
        return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
"""

START = "import json, sys\nasked = json.loads(sys.argv[1])\nimport torch\n"

DFQ = "import dfq\nmodel = dfq.load(asked['path'])\n"

TIMM = """
import timm
from safetensors.torch import load_file
model = timm.create_model(**asked['model'])
model.load_state_dict(load_file(asked['path']))
model.eval()
"""

CLASSIFY = """
torch.set_num_threads(asked['threads'])
with torch.inference_mode():
    model(torch.zeros(asked['shape']))
print(peak(), flush=True)
"""


def cold_starts(
    checkpoint: Path,
    info: CheckpointInfo,
    threads: int,
    directory: Path,
    advance: Callable[[int], None],
) -> tuple[list[ColdStart], list[SkippedRuntime]]:
    """Measure cold starts of ``dfq.load`` and of the same model in timm, if timm has it.

    timm's model is loaded from a safetensors file.  Files are in the operating system's cache.
    """
    shape = [1, info.arch.in_channels, *info.arch.image_size]
    asked: dict[str, Any] = {"shape": shape, "threads": threads}
    programs = {"dfq": (DFQ, {**asked, "path": str(checkpoint.resolve())})}
    skipped = []
    try:
        arguments, weights = _timm_weights(info, directory)
        programs["timm-fp32"] = (TIMM, {**asked, "model": arguments, "path": str(weights)})
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError) as error:
        reason = f"timm does not build it by its name ({str(error).splitlines()[0]:.80})"
        skipped.append(SkippedRuntime("timm-fp32", reason))
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in programs}
    for _ in range(REPEATS):
        for name, (code, given) in programs.items():
            runs[name].append(_measure(START + PEAK + code + CLASSIFY, given))
            advance(1)
    return [_median(name, measured) for name, measured in runs.items()], skipped


def _median(name: str, runs: list[tuple[float, int]]) -> ColdStart:
    seconds, peaks = zip(*runs, strict=True)
    return ColdStart(name, statistics.median(seconds), int(statistics.median(peaks)))


def _timm_weights(info: CheckpointInfo, directory: Path) -> tuple[dict[str, Any], Path]:
    """Return timm's arguments for the checkpoint's model, and a file with random weights of it."""
    arch, name = info.arch, str(info.source.get("timm_name"))
    arguments: dict[str, Any] = {
        "model_name": name,
        "img_size": arch.image_size,
        "in_chans": arch.in_channels,
        "num_classes": arch.num_classes,
    }
    if name == "demo":
        arguments = dict(demo.MODEL_ARGS)
    arguments |= matching_pool_keywords(arch, arguments)
    model: nn.Module = timm.create_model(**arguments)
    if describe(model, name) != arch:
        raise ValueError("it is of another architecture")
    path = directory / "timm.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return arguments, path


def _measure(code: str, asked: dict[str, Any]) -> tuple[float, int]:
    """Run a process; return seconds until its first prediction, and its peak memory in bytes."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(asked["threads"])
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(asked)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
    ) as process:
        assert process.stdout is not None
        peak = process.stdout.readline().strip()
        seconds = time.perf_counter() - started
        _, problem = process.communicate()
    if not peak.isdecimal() or process.returncode:
        last = (problem.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"A process that loads the model failed: {last:.200}")
    return seconds, int(peak)
