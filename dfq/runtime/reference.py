"""The arithmetic of integer layers, defined in plain torch.

Every other backend must agree with it: float outputs within 4 units in the last place
of float32 of the largest term, uint8 outputs within one level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.runtime.params import LinearParams, OutputFormat

NAME = "reference"


def prepack(params: LinearParams) -> object:
    """The weight in float64, in which sums of integer products are exact."""
    return params.weight.double()


def linear(x: Tensor, params: LinearParams, packed: object, out: OutputFormat) -> Tensor:
    """Exact integer sums, then one float32 multiplication and one addition per output."""
    assert isinstance(packed, Tensor)
    sums = (x.double() - params.input_zero_point) @ packed.T
    y = sums.float() * (params.weight_scale * params.input_scale) + params.bias
    if out.gelu is not None:
        y = F.gelu(y, approximate=out.gelu)
    if out.dtype == torch.uint8:
        return quantize(y, out.scale, out.zero_point)
    return y.to(out.dtype)


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Float to uint8: ``round(x / scale) + zero_point``, ties to even, clipped to 0..255."""
    return (x.float() / scale).round_().add_(zero_point).clamp_(0, 255).to(torch.uint8)


def quantize_signed(x: Tensor, scale: float) -> Tensor:
    """Float to symmetric int8: ``round(x / scale)``, ties to even, clipped to -127..127."""
    return (x.float() / scale).round_().clamp_(-127, 127).to(torch.int8)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[float, float, float, float],
    bias: Tensor | None = None,
) -> Tensor:
    """Attention whose two products take 8-bit integers; returns float32 ``[B, H, T, D]``.

    ``q``, ``k`` and ``v`` are float ``[B, H, T, D]``; ``scales`` are those of q, k, v
    (int8, symmetric) and of the probabilities (uint8, zero point 0).  ``bias`` is added to
    the scores.  Queries may be fewer than keys.  Integers are
    carried in float32, where sums below 2^24 are exact: every score with a head of at
    most 1040 channels, every output with at most 518 tokens; beyond, sums are rounded to
    24 bits.
    """
    q_scale, k_scale, v_scale, p_scale = scales
    q, k, v = (quantize_signed(x, s).float() for x, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    scores = (q @ k.transpose(-2, -1)) * (q_scale * k_scale * q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias.float()
    probabilities = quantize(scores.softmax(-1), p_scale, 0).float()
    return (probabilities @ v) * (p_scale * v_scale)
