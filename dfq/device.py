"""Devices, and what they compute fast."""

from __future__ import annotations

import torch

from dfq.errors import DeviceError

TYPES = ("cpu", "cuda", "mps", "xpu")


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name (``cpu``, ``cuda``, ``cuda:1``, ...).

    Raises:
        DeviceError: the name is unknown or the device is not there.
    """
    try:
        device = torch.device(name)
        if device.type not in TYPES:
            raise RuntimeError(f"dfq runs on {', '.join(TYPES)}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"Device {str(name)!r} cannot be used ({reason:.120}); available: {', '.join(there)}."
        ) from error
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bfloat16`` where the processor multiplies it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native else "float32"
