"""Description of the hardware and software of a measurement, as JSON values."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

import dfq


def hardware() -> dict[str, Any]:
    """Return processor, cores, threads, memory in bytes, and PyTorch's CPU capability."""
    report = dfq.doctor()
    return {
        "processor": report.processor,
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "instructions": list(report.instructions),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "devices": list(report.devices),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return versions of dfq and its dependencies, and a digest of dfq's code."""
    return {**dfq.doctor().versions, "dfq_code": dfq_code()}


def dfq_code() -> str:
    """Return the SHA-256 (first 16 hex digits) over dfq's Python files."""
    root = Path(dfq.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
