"""The machine and the libraries that results are recorded with."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import safetensors
import timm
import torch

from dfq._version import __version__
from dfq.device import cpu_has


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "dfq": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def processor() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instructions() -> tuple[str, ...]:
    """Those of the processor that integer and bfloat16 kernels use."""
    return tuple(
        name for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile") if cpu_has(name)
    )
