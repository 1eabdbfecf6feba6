"""Devices, and what they compute fast."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dfq.errors import DeviceError

TYPES = ("cpu", "cuda")


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name (``cpu``, ``cuda``, ``cuda:1``, ...).

    Workers that ``torchrun`` started share a machine's GPUs out where ``cuda`` has no number.

    Raises:
        DeviceError: the name is unknown or the device is not there.
    """
    try:
        device = torch.device(name)
        if device.type not in TYPES:
            raise RuntimeError(f"dfq runs on {', '.join(TYPES)}")
        if device.type == "cuda" and device.index is None and "TORCHELASTIC_RUN_ID" in os.environ:
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            device = torch.device("cuda", rank % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = textwrap.shorten(str(error).splitlines()[0], 160, placeholder=" ...")
        raise DeviceError(
            f"Device {str(name)!r} cannot be used ({reason}); available: {', '.join(there)}."
        ) from error
    return device


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Run with this many of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_has(feature: str) -> bool:
    """Whether this processor has an instruction set, named as torch.cpu's probes are."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and bool(probe())


def multiplies_bytes(device: torch.device) -> bool:
    """Whether products of uint8 and int8 are fast and exact here, which takes x86's VNNI.

    Without it oneDNN adds pairs of products in 16 bits, which saturate.
    """
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and cpu_has("vnni")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bfloat16`` where the processor multiplies it natively.

    Raises:
        DeviceError: ``int8`` is asked for where 8-bit products are not exact.
    """
    if precision == "int8" and not multiplies_bytes(device):
        raise DeviceError(
            f"precision is 'int8', which takes an x86 processor with 8-bit dot products (VNNI), "
            f"not {device.type!r} here. Use 'auto'."
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has("avx512_bf16") or cpu_has("amx_tile")
    return "bfloat16" if native else "float32"


def carrier(precision: str, device: torch.device) -> torch.dtype:
    """The floating-point type of what a resolved precision leaves to floating point."""
    name = resolve_precision("auto", device) if precision == "int8" else precision
    dtype: torch.dtype = getattr(torch, name)
    return dtype
