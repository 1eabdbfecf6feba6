"""oneDNN backend for x86 processors, through the operators that PyTorch ships."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.device import int8_is_exact
from dfq.runtime import elementwise, reference
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat

NAME = "onednn"

MAX_WEIGHT_WITHOUT_VNNI = 64
"""Largest weight that is exact without VNNI, where pairs of products are added in 16 bits:
``2 * 255 * 64 < 2 ** 15``."""


def unsupported_reason(device: torch.device, needs: KernelRequirements) -> str | None:
    """Return why the kernels are not exact here, or None if they are."""
    if device.type != "cpu":
        return f"it runs on x86 processors, not on {device.type!r}."
    if int8_is_exact(
        device, 127 if needs.max_weight > MAX_WEIGHT_WITHOUT_VNNI else MAX_WEIGHT_WITHOUT_VNNI
    ):
        return None
    if int8_is_exact(device, MAX_WEIGHT_WITHOUT_VNNI):
        return (
            "without 8-bit dot products (VNNI) its sums saturate beyond weights of "
            f"{MAX_WEIGHT_WITHOUT_VNNI}, and weights reach {needs.max_weight}; quantize with "
            "reduce_range = true (the default)."
        )
    return "its 8-bit products are exact only on x86 processors with VNNI or AVX2."


slow_reason = reference.slow_reason
linear_dtype = elementwise.integer_dtype
attention_dtype = elementwise.attention_dtype
max_tile_scores = reference.max_tile_scores
quantize = elementwise.quantize
prepack_norm = elementwise.prepack_norm
quantize_norm = elementwise.quantize_norm
attention = elementwise.attention


def pack_weight(integers: Tensor) -> Tensor:
    """Pack int8 ``[out, in]`` into oneDNN's blocked layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None)
    return packed


def prepack(params: LinearParams) -> object:
    """Pack the weight; returns it with its scales, zero points and bias."""
    zero_points = torch.zeros_like(params.weight_scale, dtype=torch.int32)
    weight = pack_weight(params.weight.integers)
    return weight, params.weight_scale, zero_points, params.bias


def linear(
    x: Tensor,
    params: LinearParams,
    packed: object,
    out: OutputFormat,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`dfq.runtime.reference.linear`; a contiguous ``residual`` is overwritten."""
    assert isinstance(packed, tuple)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], len(params.bias)), dtype=out.dtype)
    weight, scale, zero_points, bias = packed
    source = (x, params.input.scale, params.input.zero_point, weight)
    if residual is not None:
        total = residual.contiguous()
        torch.ops.onednn.qlinear_pointwise.binary(
            *(*source, scale, zero_points, total, bias, 1.0, 0, torch.float32, 1.0, 0),
            *("sum", 1.0, "none", [], "none"),
        )
        return total
    out_scale = out.scale
    if isinstance(out_scale, Tensor) or out.dtype.is_floating_point:
        if isinstance(out_scale, Tensor) or out_scale != 1:
            scale, bias = scale / out_scale, bias / out_scale
        out_scale = 1.0
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(*source, scale, zero_points, bias),
        *(out_scale, out.zero_point, out.dtype),
        *("none" if out.gelu is None else "gelu", []),
        "none" if out.gelu is None else out.gelu,
    )
    return y if out.dtype != torch.uint8 or out.qmax == 255 else y.clamp_(max=out.qmax)
