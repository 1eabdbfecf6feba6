"""Work between matrix products that backends share, in few passes over memory.

Plain torch: right on every device, and within one level of :mod:`dfq.runtime.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.device import resolve_precision
from dfq.runtime import reference
from dfq.runtime.qtype import QParams


def to_uint8(x: Tensor, largest: int = 255) -> Tensor:
    """Convert float ``x`` in place to uint8 ``round(x) + 128``, clamped to 0 and ``largest``.

    Goes through int8, to which PyTorch converts ten times as fast as to uint8.
    """
    signed = x.round_().clamp_(-128, largest - 128).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(128)


def quantize(x: Tensor, qparams: QParams, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As :func:`dfq.runtime.reference.quantize`, in vectorized passes."""
    if qparams.qtype.signed:
        return reference.quantize(x, qparams)
    x, scale, largest = x.float(), qparams.scale, qparams.qtype.qmax
    middle = x.new_full((), qparams.zero_point - 128, dtype=torch.float32)  # no copy from the host
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


def integer_dtype(device: torch.device) -> torch.dtype:  # noqa: ARG001 (the interface)
    """Return int8, which kernels for integers multiply in on every device."""
    return torch.int8


def attention_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which :func:`attention` multiplies integers: bfloat16 where that is
    native, else float32."""
    return torch.bfloat16 if resolve_precision("auto", device) == "bfloat16" else torch.float32


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """As :func:`dfq.runtime.reference.attention`, computed in bfloat16 where that is native.

    bfloat16 holds integers up to 256, so the operands of both products are exact and their
    sums are float32; scores and outputs are then rounded to 8 bits of mantissa.
    """
    if attention_dtype(q.device) != torch.bfloat16:
        return reference.attention(q, k, v, scale, bias)
    q, k, v = (x.to(torch.bfloat16, memory_format=torch.contiguous_format) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)).mul_(scale)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    shares = scores.sub_(scores.amax(-1, keepdim=True)).exp_().mul_(255).round_()
    return (shares @ v) / shares.sum(-1, keepdim=True, dtype=torch.float32)
