"""Description of the machine and the libraries, recorded with results."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors
import torch

from dfq._version import __version__
from dfq.device import cpu_has


def versions() -> dict[str, str]:
    """Return the versions of dfq, Python and the libraries that affect results."""
    import timm  # takes a second, which loading a checkpoint does not need

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


PRODUCTS = """
import torch
x, w = torch.ones(16, 64), torch.ones(64, 64)
packed = torch.ops.onednn.qlinear_prepack(w.to(torch.int8), None)
scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
torch.ops.onednn.qlinear_pointwise(
    x.to(torch.uint8), 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
)
torch.nn.functional.linear(x.bfloat16(), w.bfloat16())
"""
"""A program that multiplies 8-bit integers and bfloat16 through oneDNN."""

_EXECUTED = re.compile(r"exec,cpu,(?:matmul|inner_product),([^,]+),.*?src:(u8|bf16):")


@functools.cache
def isa() -> dict[str, str]:
    """Return the instruction sets that kernels run on in this process's environment.

    ``pytorch``: PyTorch's own kernels.  ``onednn``: what oneDNN reports; ``onednn int8`` and
    ``onednn bfloat16``: its kernel for such products.  Unlike :func:`instructions` they follow
    ``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY``.  Those of oneDNN are missing where PyTorch
    comes without it.  A process of its own, of some seconds, is asked once.
    """
    reported_isa = {"pytorch": torch.backends.cpu.get_cpu_capability()}
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", PRODUCTS],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return reported_isa
    reported = re.search(r"info,cpu,isa:(.*)", ended.stdout)
    if reported is not None:
        reported_isa["onednn"] = reported[1].strip()
    types = {"u8": "int8", "bf16": "bfloat16"}
    kernels = {f"onednn {types[dtype]}": name for name, dtype in _EXECUTED.findall(ended.stdout)}
    return {**reported_isa, **kernels}
