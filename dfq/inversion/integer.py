"""Linear layers that multiply 8-bit integers, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfq.runtime import onednn

TINY = 1e-30
"""Least scale of a row, so that a gradient of zero stays zero."""

ROUNDING = 1.5 * 2**23 + 128
"""Added to a float32 of small magnitude, it leaves the nearest integer, plus 128, in the last byte
of the sum."""


class IntegerProduct(nn.Module):
    """Linear layer with constant weights whose forward and backward products are of integers.

    Weights have a scale for each output, forward and backward alike.  Inputs and gradients
    have one for each row, computed at run time: the class token's gradient is far larger
    than those of the patches, which one scale for all would round away.  Results are in
    the input's type.
    """

    bias: Tensor

    def __init__(self, linear: nn.Linear, largest: int) -> None:
        """``largest`` is the largest magnitude of an integer weight."""
        super().__init__()
        weight = linear.weight.detach().float()
        self.register_buffer("bias", linear.bias.detach())
        self.forward_weight, self.backward_weight = (
            pack(each, largest) for each in (weight, weight.t())
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``[..., in]``; returns ``[..., out]``."""
        y: Tensor = _Product.apply(x, self.forward_weight, self.backward_weight, self.bias)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, transposed: Any, bias: Tensor) -> Tensor:
        ctx.transposed = transposed
        y, scale = multiply(x, weight)
        return torch.addcmul(bias, y, scale, out=y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        y, scale = multiply(gradients[0], ctx.transposed)
        return y.mul_(scale), None, None, None


Packed = tuple[Tensor, Tensor, Tensor]
"""oneDNN's blocked int8 copy of ``[out, in]``, scales and zero points ``[out]``."""


def pack(weight: Tensor, largest: int) -> Packed:
    """Round and pack a weight ``[out, in]`` to integers of at most ``largest`` in magnitude."""
    scale = weight.abs().amax(1).clamp_min(TINY) / largest
    integers = (weight / scale[:, None]).round_().to(torch.int8)
    return onednn.pack_weight(integers), scale, torch.zeros(len(scale), dtype=torch.int32)


def multiply(x: Tensor, weight: Packed, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the product divided by each row's scale, and the scales ``[..., 1]``.

    With ``overwrite`` a float32 ``x`` is used as scratch memory.
    """
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    largest = largest.float().clamp_min_(TINY)
    rows = torch.mul(x, 127 / largest, out=x if overwrite else None).add_(ROUNDING)
    unsigned = rows.view(torch.int32).to(torch.int8).view(torch.uint8)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(unsigned, 1.0, 128, *weight, None, 1.0, 0, x.dtype, "none", [], "")
    )
    return y, (largest / 127).to(x.dtype)
