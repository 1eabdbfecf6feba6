"""Devices and the number formats that they support natively."""

from __future__ import annotations

import functools
import importlib.util
import os
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from dfq.errors import DeviceError

TYPES = ("cpu", "cuda")

LARGEST_WEIGHT = {"int8": 127, "int7": 63}
"""Largest magnitude of an integer weight, by the precision of inversion.

Without VNNI, oneDNN adds pairs of products in 16 bits: those of 7-bit weights fit, as
``2 * 255 * 63 < 2 ** 15``.
"""


def resolve_device(name: str | torch.device) -> torch.device:
    """Return a usable device by name (``cpu``, ``cuda``, ``cuda:1``, ...).

    Under ``torchrun``, ``cuda`` without an index is the GPU of the worker's local rank.

    Raises:
        DeviceError: the name is unknown, or the device is not available.
    """
    try:
        if str(name).partition(":")[0] not in TYPES:
            raise RuntimeError(f"dfq runs on {' and '.join(TYPES)}")
        device = torch.device(name)
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
    """Set the number of PyTorch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable the caller's autocast on a device inside the block."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def cpu_has(feature: str) -> bool:
    """Whether the processor has an instruction set, named as in ``torch.cpu._is_*_supported``."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and bool(probe())


def int8_is_exact(device: torch.device, largest: int = 127) -> bool:
    """Whether oneDNN multiplies uint8 by int8 of magnitude up to ``largest`` without saturation.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate unless weights are small.
    ``ONEDNN_MAX_CPU_ISA`` can disable VNNI, so the products are tried out once per process.
    """
    return device.type == "cpu" and _worst_product_is_exact(largest)


@functools.cache
def _worst_product_is_exact(largest: int) -> bool:
    """Compare the most extreme sums that weights of this magnitude can give with exact ones."""
    if not torch.backends.mkldnn.is_available() or not cpu_has("avx2"):
        return False
    cpu = torch.device("cpu")
    weight = torch.full((32, 100), largest, dtype=torch.int8, device=cpu)
    weight[::2] = -largest
    ones = torch.ones(32, dtype=torch.float32, device=cpu)
    zeros = torch.zeros(32, dtype=torch.int32, device=cpu)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        for rows in (1, 17):
            x = torch.full((rows, 100), 255, dtype=torch.uint8, device=cpu)
            y = torch.ops.onednn.qlinear_pointwise(
                *(x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            )
            if not torch.equal(y, (x.int() @ weight.int().T).float()):
                return False
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, which makes it faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = cpu_has("avx512_bf16") or cpu_has("amx_tile")
    if not native or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto`` to ``bfloat16`` where it is native, else ``float32``; keep other names."""
    if precision != "auto":
        return precision
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def resolve_products(precision: str, device: torch.device) -> str:
    """Resolve the precision of inversion, whose products may be of integers.

    ``auto`` is ``bfloat16`` where it is native, else ``float32``; other names are kept.

    Raises:
        DeviceError: integers are requested where their products are not exact.
    """
    largest = LARGEST_WEIGHT.get(precision)
    if largest is not None and not int8_is_exact(device, largest):
        needed = "8-bit dot products (VNNI)" if precision == "int8" else "AVX2"
        raise DeviceError(
            f"precision is {precision!r}, which takes an x86 processor with {needed}, "
            f"not {device.type!r} here. Use 'auto'."
        )
    return resolve_precision(precision, device)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the floating-point operations under a resolved precision."""
    floats = {"int8": resolve_precision("auto", device), "int7": "float32"}
    dtype: torch.dtype = getattr(torch, floats.get(precision, precision))
    return dtype
