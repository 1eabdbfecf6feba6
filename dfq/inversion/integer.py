"""Linear layers that multiply 8-bit integers, forward and backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dfq.inversion.frozen import replace_linears
from dfq.runtime import onednn
from dfq.runtime.elementwise import to_uint8
from dfq.vit import ViT

TINY = 1e-30
"""Least scale of a row, so that a gradient of zero stays zero."""


class IntegerProduct(nn.Module):
    """Linear layer with constant weights whose forward and backward products are of integers.

    Weights have a scale for each output, forward and backward alike.  Inputs and gradients
    have one for each row, computed at run time: the class token's gradient is far larger
    than those of the patches, which one scale for all would round away.  Results are in
    the input's type.
    """

    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.register_buffer("bias", linear.bias.detach())
        self.forward_weight, self.backward_weight = _pack(weight), _pack(weight.t())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``[..., in]``; returns ``[..., out]``."""
        y: Tensor = _Product.apply(x, self.forward_weight, self.backward_weight, self.bias)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, transposed: Any, bias: Tensor) -> Tensor:
        ctx.transposed = transposed
        y, scale = _multiply(x, weight)
        return torch.addcmul(bias, y, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        y, scale = _multiply(gradients[0], ctx.transposed)
        return y.mul_(scale), None, None, None


def _pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return oneDNN's blocked int8 copy of ``[out, in]``, scales and zero points ``[out]``."""
    scale = weight.abs().amax(1).clamp_min(TINY) / 127
    integers = (weight / scale[:, None]).round_().to(torch.int8)
    return onednn.pack_weight(integers), scale, torch.zeros(len(scale), dtype=torch.int32)


def _multiply(x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the product divided by each row's scale, and the scales ``[..., 1]``."""
    rows = x.to(torch.float32, copy=True)
    largest = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))
    largest.clamp_min_(TINY)
    unsigned = to_uint8(rows.mul_(127 / largest))
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(unsigned, 1.0, 128, *weight, None, 1.0, 0, x.dtype, "none", [], "")
    )
    return y, (largest / 127).to(x.dtype)


@torch.no_grad()
def multiply_integers(vit: ViT) -> None:
    """Replace the linear layers of a ViT's blocks by :class:`IntegerProduct`.

    The affine parameters of layer norms are folded into the layers after them, so that the
    channels of their inputs have similar ranges.
    """
    for index in range(vit.arch.depth):
        block = vit.block(index)
        _fold(block.norm1, cast(nn.Linear, block.attn.qkv))
        _fold(block.norm2, cast(nn.Linear, block.mlp.fc1))
        replace_linears(block, IntegerProduct)


def _fold(norm: nn.Module, linear: nn.Linear) -> None:
    assert isinstance(norm, nn.LayerNorm)
    weight, shift = linear.weight.float(), norm.bias.float()
    linear.bias.copy_(linear.bias.float() + weight @ shift)
    linear.weight.copy_(weight * norm.weight.float())
    norm.weight.fill_(1)
    norm.bias.zero_()
