"""Backend that multiplies integers in floating-point matrix products, exactly, on any device.

Integers of 8 bits are exact in float32, bfloat16 and float16, and so is every partial sum of their
products in float32 below 2**24, in whatever order a kernel adds them.  A layer's largest possible
sum follows from its weights, so :func:`prepack` splits the inputs where it exceeds that: sums are
those of :mod:`dfq.runtime.reference`, at the speed of the device's floating-point products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.device import multiplies_bfloat16
from dfq.runtime import elementwise, reference
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat

NAME = "float"

EXACT = 1 << 24
"""float32 holds every integer up to this."""


@dataclass(frozen=True)
class PackedWeight:
    """Weights ``[out, part]`` of consecutive parts of the inputs, with exact sums each."""

    parts: tuple[Tensor, ...]
    scale: Tensor


def unsupported_reason(device: torch.device, needs: KernelRequirements) -> str | None:  # noqa: ARG001 (the interface)
    """Return None: weights decide how products are split, not whether they are exact."""
    return None


slow_reason = reference.slow_reason
attention_dtype = elementwise.attention_dtype
max_tile_scores = reference.max_tile_scores
quantize = elementwise.quantize
prepack_norm = elementwise.prepack_norm
quantize_norm = elementwise.quantize_norm
attention = elementwise.attention


@functools.cache
def linear_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the operands: on GPUs the fastest whose products have float32 sums."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float16


def prepack(params: LinearParams) -> object:
    """Convert the weight to floating point, split where sums could exceed 2**24."""
    integers = params.weight.integers
    size = exact_inputs(integers, params.input.zero_point, params.input.qtype.qmax)
    weight = integers.to(linear_dtype(integers.device))
    parts = tuple(part.contiguous() for part in weight.split(size, dim=1))
    return PackedWeight(parts, params.weight_scale * params.input.scale)


def exact_inputs(integers: Tensor, zero_point: int, qmax: int) -> int:
    """Return how many consecutive inputs may be summed up exactly, for every activation.

    ``integers`` are int8 weights ``[out, in]``; activations are from 0 to ``qmax``.
    """
    inputs, largest = integers.shape[1], max(zero_point, qmax - zero_point)
    magnitudes = integers.int().abs()
    for count in range(1, inputs + 1):
        size = -(-inputs // count)
        sums = (part.sum(1).amax() for part in magnitudes.split(size, dim=1))
        if max(int(total) for total in sums) * largest <= EXACT:
            return size
    return 1


def linear(
    x: Tensor,
    params: LinearParams,
    packed: object,
    out: OutputFormat,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`dfq.runtime.reference.linear`, with the same bits up to two parts of the inputs;
    with more, sums above 2**24 are rounded more than once."""
    assert isinstance(packed, PackedWeight)
    first = packed.parts[0]
    centered = x.to(first.dtype).sub_(params.input.zero_point)
    size = first.shape[1]
    sums = product(centered[..., :size], first)
    for i, part in enumerate(packed.parts[1:], 1):
        sums += product(centered[..., i * size : i * size + part.shape[1]], part)
    return scale_sums(sums, packed.scale, params.bias, out, residual)


def scale_sums(
    sums: Tensor, scale: Tensor, bias: Tensor, out: OutputFormat, residual: Tensor | None
) -> Tensor:
    """As :func:`finish`, with a residual that is added last to float32 output."""
    if residual is not None:
        return sums.mul_(scale).add_(bias).add_(residual)
    return finish(sums, scale, bias, out)


def finish(sums: Tensor, scale: Tensor, bias: Tensor, out: OutputFormat) -> Tensor:
    """Convert float32 sums ``[..., out]``, which may be overwritten, to the output format.

    ``scale`` and ``bias`` are float32 ``[out]``, before the division by the output's scale.
    """
    if out.gelu is None:
        scale, bias = scale / out.scale, bias / out.scale
    y = torch.addcmul(bias, sums, scale)
    if out.gelu is not None:
        y = F.gelu(y, approximate=out.gelu)
        if out.scale != 1:
            y = y.div_(out.scale)
    if out.dtype == torch.uint8:
        return elementwise.to_uint8(y.add_(out.zero_point - 128), out.qmax)
    if out.dtype == torch.int8:
        return y.round_().clamp_(-127, 127).to(torch.int8)
    return y.to(out.dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of ``[..., in]`` and ``[out, in]`` with float32 sums."""
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    rows = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
    return rows.unflatten(0, x.shape[:-1])
