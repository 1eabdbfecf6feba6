"""Backend of 8-bit products with int32 sums by ``torch._int_mm``, for GPUs on which it is faster.

Exact: ``x - 128`` is int8, and ``(x - zero_point) @ weight`` is ``(x - 128) @ weight`` plus a
constant for each output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.device import int8_is_exact
from dfq.runtime import elementwise, float_gemm, reference, speeds
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat

NAME = "int_mm"

MIN_ROWS = 32
"""Rows that fewer are padded to: on CUDA the product takes more than 16."""

MULTIPLE = 8
"""On CUDA, numbers of inputs and outputs are multiples of this; others are padded."""

MARGIN = 1.05
"""How much faster than products in floating point it must be, above the noise of a measurement."""


@dataclass(frozen=True)
class PackedWeight:
    """Weight int8 ``[inputs, outputs]``, padded, in columns; what its sums lack, int32 ``[out]``,
    and their scale, float32 ``[out]``."""

    weight: Tensor
    shift: Tensor
    scale: Tensor


def unsupported_reason(device: torch.device, needs: KernelRequirements) -> str | None:  # noqa: ARG001 (the interface)
    """Return why the products are not exact on a device, or None if they are."""
    if device.type == "cpu" and not int8_is_exact(device):
        return "its 8-bit products are exact only on CPUs with dot products (VNNI), and on GPUs."
    return None


def slow_reason(device: torch.device, needs: KernelRequirements) -> str | None:
    """Return why products in floating point are faster on a device, None if a measurement of the
    layer's shape says otherwise."""
    if device.type != "cuda":
        return "it is for GPUs."
    if needs.inputs is None or needs.outputs is None:
        return "whether it is faster is measured for each layer's shape."
    candidates: dict[str, speeds.Kernels] = {
        float_gemm.NAME: speeds.Kernels(float_gemm.prepack, float_gemm.linear),
        NAME: speeds.Kernels(prepack, linear),
    }
    times = speeds.seconds(device, needs.inputs, needs.outputs, candidates)
    own, other = times.get(NAME), times.get(float_gemm.NAME)
    if own is None or other is None:
        return "this GPU or its driver refuses products of this shape."
    if own * MARGIN <= other:
        return None
    return f"measured {own * 1e6:.0f} us for this shape, 'float' {other * 1e6:.0f} us."


linear_dtype = elementwise.integer_dtype
attention_dtype = elementwise.attention_dtype
max_tile_scores = reference.max_tile_scores
quantize = elementwise.quantize
prepack_norm = elementwise.prepack_norm
quantize_norm = elementwise.quantize_norm
attention = elementwise.attention


def prepack(params: LinearParams) -> object:
    """Pad the weight, and sum it up for the shift of the inputs."""
    integers = params.weight.integers
    outputs, inputs = integers.shape
    padded = F.pad(integers, (0, -inputs % MULTIPLE, 0, -outputs % MULTIPLE)).contiguous()
    shift = integers.sum(1, dtype=torch.int32) * (128 - params.input.zero_point)
    return PackedWeight(padded.T, shift, params.weight_scale * params.input.scale)


def linear(
    x: Tensor,
    params: LinearParams,
    packed: object,
    out: OutputFormat,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`dfq.runtime.reference.linear`, with the same sums."""
    assert isinstance(packed, PackedWeight)
    rows = x.flatten(0, -2).bitwise_xor(128).view(torch.int8)  # x - 128
    count, inputs = rows.shape
    missing = max(0, MIN_ROWS - count), packed.weight.shape[0] - inputs
    if any(missing):
        rows = F.pad(rows, (0, missing[1], 0, missing[0]))
    sums = torch._int_mm(rows, packed.weight)[:count, : len(packed.shift)]
    exact = (sums + packed.shift).float().unflatten(0, x.shape[:-1])
    return float_gemm.scale_sums(exact, packed.scale, params.bias, out, residual)
