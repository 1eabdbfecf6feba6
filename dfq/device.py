"""Devices, and what they compute fast."""

from __future__ import annotations

import torch

from dfq.errors import DeviceError

TYPES = ("cpu", "cuda")


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
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"Device {str(name)!r} cannot be used ({reason:.120}); available: {', '.join(there)}."
        ) from error
    return device


def cpu_has(feature: str) -> bool:
    """Whether this processor has an instruction set, named as torch.cpu's probes are."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and bool(probe())


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bfloat16`` where the processor multiplies it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has("avx512_bf16") or cpu_has("amx_tile")
    return "bfloat16" if native else "float32"
