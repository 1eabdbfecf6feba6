"""oneDNN backend for x86 processors, through the operators that PyTorch ships.

Between the matrix products it makes as few passes over memory as eager PyTorch allows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.device import int8_is_exact, resolve_precision
from dfq.runtime import reference
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat
from dfq.runtime.qtype import QParams

NAME = "onednn"

MAX_WEIGHT_WITHOUT_VNNI = 64
"""Largest weight that is exact without VNNI, where pairs of products are added in 16 bits:
``2 * 255 * 64 < 2 ** 15``."""


def unsupported_reason(device: torch.device, needs: KernelRequirements) -> str | None:
    """Return why the kernels are not exact here, or None if they are."""
    largest = needs.max_weight
    if int8_is_exact(device, 127 if largest > MAX_WEIGHT_WITHOUT_VNNI else MAX_WEIGHT_WITHOUT_VNNI):
        return None
    return (
        "it needs an x86 processor with 8-bit dot products (VNNI), or AVX2 and weights within "
        f"-{MAX_WEIGHT_WITHOUT_VNNI}..{MAX_WEIGHT_WITHOUT_VNNI}; here it is {device.type!r}, and "
        f"weights reach {largest}. Use "
        "'reference', or quantize with reduce_range."
    )


max_tile_scores = reference.max_tile_scores


def pack_weight(integers: Tensor) -> Tensor:
    """Pack int8 ``[out, in]`` into oneDNN's blocked layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None)
    return packed


def to_uint8(x: Tensor, largest: int = 255) -> Tensor:
    """Convert float ``x`` in place to uint8 ``round(x) + 128``, clamped to 0 and ``largest``.

    Goes through int8, to which PyTorch converts ten times as fast as to uint8.
    """
    signed = x.round_().clamp_(-128, largest - 128).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(128)


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


def quantize(x: Tensor, qparams: QParams, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As :func:`dfq.runtime.reference.quantize`, in vectorized passes."""
    if qparams.qtype.signed:
        return reference.quantize(x, qparams)
    x, scale, largest = x.float(), qparams.scale, qparams.qtype.qmax
    middle = x.new_tensor(qparams.zero_point - 128, dtype=torch.float32)
    if affine is None:
        return to_uint8(torch.add(middle, x, alpha=1 / scale), largest)
    return to_uint8(torch.addcmul(affine[1] / scale + middle, x, affine[0] / scale), largest)


def prepack_norm(norm: nn.LayerNorm, qparams: QParams) -> object:
    """Fold the output's qparams into the norm's affine, which then gives integers minus 128."""
    scale, zero_point = qparams.scale, qparams.zero_point
    weight, bias = norm.weight / scale, norm.bias / scale + (zero_point - 128)
    return (norm.normalized_shape, weight, bias, norm.eps), qparams.qtype.qmax


def quantize_norm(x: Tensor, packed: object) -> Tensor:
    """As :func:`dfq.runtime.reference.quantize_norm`."""
    assert isinstance(packed, tuple)
    arguments, largest = packed
    return to_uint8(F.layer_norm(x, *arguments), largest)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """As :func:`dfq.runtime.reference.attention`, computed in bfloat16 where that is native.

    bfloat16 holds integers up to 256, so the operands of both products are exact and their
    sums are float32; scores and outputs are then rounded to 8 bits of mantissa.
    """
    if resolve_precision("auto", q.device) != "bfloat16":
        return reference.attention(q, k, v, scale, bias)
    q, k, v = (x.to(torch.bfloat16, memory_format=torch.contiguous_format) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)).mul_(scale)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    shares = scores.sub_(scores.amax(-1, keepdim=True)).exp_().mul_(255).round_()
    return (shares @ v) / shares.sum(-1, keepdim=True, dtype=torch.float32)
