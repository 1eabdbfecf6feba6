"""Reference backend: the arithmetic of integer layers in plain torch.

Every other backend must agree with it: float outputs within 4 units in the last place
of float32 of the largest term, integer outputs within one level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat
from dfq.runtime.qtype import INT8, QParams, QType

NAME = "reference"

CACHED_SCORES = 1 << 20
"""Attention scores of a tile on a CPU: 2 MB in bfloat16, the size of an L2 cache."""

SCORES_IN_MEMORY = 1 << 28
"""Attention scores of a tile on other devices: 1 GB in float32."""


def unsupported_reason(device: torch.device, needs: KernelRequirements) -> str | None:  # noqa: ARG001 (the interface)
    """Return None: the reference is exact everywhere."""
    return None


def slow_reason(device: torch.device, needs: KernelRequirements) -> str | None:  # noqa: ARG001 (the interface)
    """Return None: the order of backends says which are faster."""
    return None


def linear_dtype(device: torch.device) -> torch.dtype:  # noqa: ARG001 (the interface)
    """Return float64, in which sums of integer products are exact."""
    return torch.float64


def attention_dtype(device: torch.device) -> torch.dtype:  # noqa: ARG001 (the interface)
    """Return float32, which carries the integers of attention."""
    return torch.float32


def max_tile_scores(device: torch.device) -> int:
    """Largest number of attention scores of a tile."""
    return CACHED_SCORES if device.type == "cpu" else SCORES_IN_MEMORY


def prepack(params: LinearParams) -> object:
    """Convert the weight to float64, in which sums of integer products are exact."""
    return params.weight.integers.double()


def linear(
    x: Tensor,
    params: LinearParams,
    packed: object,
    out: OutputFormat,
    residual: Tensor | None = None,
) -> Tensor:
    """Integer linear layer: exact integer sums, one float32 multiply and add per output.

    ``residual``, float32 and of the output's shape, is added last; the output is then float32.
    """
    assert isinstance(packed, Tensor)
    sums = (x.double() - params.input.zero_point) @ packed.T
    y = sums.float() * (params.weight_scale * params.input.scale) + params.bias
    if out.gelu is not None:
        y = F.gelu(y, approximate=out.gelu)
    if residual is not None:
        return y + residual
    if out.dtype == torch.int8:
        return _round(y / out.scale, 0, INT8).to(torch.int8)
    if out.dtype == torch.uint8:
        return _round(y / out.scale, out.zero_point, QType(out.qmax.bit_length())).to(torch.uint8)
    return (y / out.scale).to(out.dtype)


def quantize(x: Tensor, qparams: QParams, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Quantize a float tensor to uint8, or to int8 for a signed type.

    ``round(x / scale) + zero_point``, ties to even, clamped to the type's range.  ``affine`` is
    a (scale, shift) pair ``[in]`` that is applied to ``x`` first.
    """
    x = x.float() if affine is None else x.float() * affine[0] + affine[1]
    qtype = qparams.qtype
    rounded = _round(x / qparams.scale, qparams.zero_point, qtype)
    return rounded.to(torch.int8 if qtype.signed else torch.uint8)


def _round(x: Tensor, zero_point: int, qtype: QType) -> Tensor:
    return x.round_().add_(zero_point).clamp_(qtype.qmin, qtype.qmax)


def prepack_norm(norm: nn.LayerNorm, qparams: QParams) -> object:
    """Pair a layer norm with the qparams of its output."""
    return norm, qparams


def quantize_norm(x: Tensor, packed: object) -> Tensor:
    """Layer norm of float ``[..., C]``, quantized to uint8."""
    assert isinstance(packed, tuple)
    norm, qparams = packed
    return quantize(norm(x), qparams)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention with both matrix products on 8-bit integers.

    ``q``, ``k`` and ``v`` are int8 ``[B, H, T, D]``; returns float32 ``[B, H, T, D]`` in units
    of ``v``.  ``scale`` turns integer scores into those of the softmax; ``bias`` is added
    to them.  Queries may be fewer than keys.

    Each row of ``exp(score - largest)`` is rounded to 0..255, its largest being 255, and
    divided by its sum after the second product, as flash attention does: the scale fits
    every row, whether one token takes all or each a 200th, and needs no calibration (as in
    SageAttention, arXiv 2410.02367, there for blocks of rows).  Integers are carried in float32,
    where sums below 2^24 are exact: every score with a head of at most 1040 channels, every
    output with at most 518 tokens; beyond, sums are rounded to 24 bits.
    """
    scores = (q.float() @ k.float().transpose(-2, -1)) * scale
    scores = scores if bias is None else scores + bias.float()
    shares = (scores - scores.amax(-1, keepdim=True)).exp_().mul_(255).round_()
    return (shares @ v.float()) / shares.sum(-1, keepdim=True)
