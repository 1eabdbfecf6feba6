"""Description of the machine and the libraries, recorded with results."""

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
    """Return the versions of dfq, Python and the libraries that affect results."""
    return {
        "dfq": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instructions() -> tuple[str, ...]:
    """Return the processor's instruction sets that integer and bfloat16 kernels use."""
    return tuple(
        name for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile") if cpu_has(name)
    )
