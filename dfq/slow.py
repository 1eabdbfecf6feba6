"""Warnings about slow kernels on this processor, with advice."""

from __future__ import annotations

import torch

from dfq.device import int8_is_exact, multiplies_bfloat16
from dfq.runtime import onednn
from dfq.runtime.params import KernelRequirements

FLOAT32 = (
    "This processor does not multiply bfloat16 natively: inversion and distillation run in "
    "float32, which takes about 1.7 times as long. A GPU or fewer iterations save time, and with "
    "AVX2 so does precision int7 in inversion."
)
EMULATED = (
    "This processor does not multiply bfloat16 natively: emulated it takes more than ten times as "
    "long as float32. Use precision = 'auto' (the default)."
)
WITHOUT_VNNI = (
    "This processor has no 8-bit dot products (VNNI): quantized models take almost twice as long "
    "as with them, still less than in floating point. Those of reduce_range = false take about as "
    "long as in floating point."
)
TOO_WIDE = (
    "Without 8-bit dot products (VNNI) weights of the full range would saturate, so layers that "
    "have them are multiplied as float32: exact, but about as slow as in floating point. `dfq "
    "inspect CHECKPOINT` names them. Quantize with reduce_range = true (the default)."
)
WITHOUT_AVX2 = (
    "8-bit products are exact neither with VNNI nor with AVX2 here, so integers are multiplied as "
    "float32: quantized models take about as long as in floating point. An export runs on what its "
    "runtime offers."
)


def slow_floats(
    device: torch.device, *, training: str | None = None, inversion: str | None = None
) -> list[str]:
    """Return warnings about training and inversion in these precisions; none on a GPU."""
    if device.type != "cpu" or multiplies_bfloat16(device):
        return []
    slow = {"auto": FLOAT32, "bfloat16": EMULATED}
    return [text for name, text in slow.items() if name in (training, inversion)]


def slow_integers(device: torch.device, largest: int = onednn.MAX_WEIGHT_WITHOUT_VNNI) -> list[str]:
    """Return warnings about a quantized model with weights up to ``largest`` in magnitude; none on
    a GPU.
    """
    if device.type != "cpu" or int8_is_exact(device):
        return []
    if onednn.unsupported_reason(device, KernelRequirements(largest)) is None:
        return [WITHOUT_VNNI]
    portable = (
        onednn.unsupported_reason(device, KernelRequirements(onednn.MAX_WEIGHT_WITHOUT_VNNI))
        is None
    )
    return [TOO_WIDE] if portable else [WITHOUT_AVX2]
