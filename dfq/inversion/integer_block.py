"""Transformer blocks of integer products whose backward pass is written out."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.device import LARGEST_WEIGHT
from dfq.inversion.frozen import replace_linears
from dfq.inversion.integer import IntegerProduct, multiply
from dfq.vit import ViT
from dfq.vit.architecture import Architecture
from dfq.vit.modules import Block
from dfq.vit.position_encoding import PositionEncoding

aten = torch.ops.aten

GELUS = {"gelu": "none", "gelu_tanh": "tanh"}
"""Activations that an :class:`IntegerBlock` has, as PyTorch's ``approximate``."""


def fits(arch: Architecture) -> bool:
    """Whether :class:`IntegerBlock` computes the blocks of such a model."""
    extras = arch.qk_norm, arch.rope, arch.attn_norm, arch.gated_mlp, arch.mlp_norm
    return not any(extras) and arch.activation in GELUS


@torch.no_grad()
def multiply_integers(vit: ViT, precision: str) -> None:
    """Replace the linear layers of a ViT's blocks by :class:`IntegerProduct`.

    The affine parameters of layer norms are folded into the layers after them, so that the
    channels of their inputs have similar ranges.  With ``int7`` the blocks themselves become
    :class:`IntegerBlock`, if that computes them.
    """
    largest = LARGEST_WEIGHT[precision]

    def product(linear: nn.Linear) -> IntegerProduct:
        return IntegerProduct(linear, largest)

    for index in range(vit.arch.depth):
        block = vit.block(index)
        qkv = cast(nn.Linear, block.attn.qkv)
        _fold(block.norm1, qkv)
        _fold(block.norm2, cast(nn.Linear, block.mlp.fc1))
        replace_linears(block, product)
        if precision == "int7" and fits(vit.arch):
            few = index == vit.arch.depth - 1 and vit.arch.pooled_tokens is not None
            vit.blocks[index] = IntegerBlock(block, qkv if few else None)


def _fold(norm: nn.Module, linear: nn.Linear) -> None:
    assert isinstance(norm, nn.LayerNorm)
    weight, shift = linear.weight.float(), norm.bias.float()
    linear.bias.copy_(linear.bias.float() + weight @ shift)
    linear.weight.copy_(weight * norm.weight.float())
    norm.weight.fill_(1)
    norm.bias.zero_()


class IntegerBlock(Block):
    """A block of :class:`IntegerProduct` as one function of autograd, for models that :func:`fits`.

    It computes what :class:`dfq.vit.modules.Block` does with the same products, in fewer passes
    over memory.  Gradients of layer norms and activations are linear in each row of the gradient,
    so that the scale of a row is applied once, after them.
    """

    def __init__(self, block: Block, qkv: nn.Linear | None = None) -> None:
        """Take over the parts of ``block``, whose layer norms have no affine left.

        ``qkv``: the floating-point layer that ``block.attn.qkv`` was made from, if only the first
        tokens are needed.
        """
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = (
            *(block.norm1, block.attn, block.norm2, block.mlp),
        )
        self.float_qkv = qkv

    def forward(
        self, x: Tensor, encoding: PositionEncoding, num_queries: int | None = None
    ) -> Tensor:
        """Return ``[B, T, embed_dim]``, or only its first ``num_queries`` tokens."""
        if num_queries is None or self.float_qkv is None:
            y: Tensor = _Block.apply(x, self, self.attn.bias(encoding))
            return y[:, :num_queries]
        bias = self.attn.bias(encoding, num_queries)
        mixed = attend_few(self.norm1(x), self.float_qkv, self.attn.num_heads, num_queries, bias)
        x = x[:, :num_queries] + cast(Tensor, self.attn.proj(mixed))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


def attend_few(
    x: Tensor, qkv: nn.Linear, heads: int, num_queries: int, bias: Tensor | None = None
) -> Tensor:
    """Attention of the first tokens of ``[B, T, C]``: ``[B, num_queries, H*D]``.

    The projections of keys and values are applied to the queries and to the weighted means of
    the tokens, of which there are far fewer than tokens.
    """
    batch, _, width = x.shape
    of_q, of_k, of_v = qkv.weight.view(3, heads, -1, width)
    bias_q, _, bias_v = qkv.bias.view(3, heads, -1)  # a key's bias shifts all scores alike
    q = torch.einsum("bqc,hdc->bhqd", x[:, :num_queries], of_q) + bias_q[:, None]
    scores = torch.einsum("bhqd,hdc->bhqc", q * q.shape[-1] ** -0.5, of_k).flatten(1, 2)
    scores = (scores @ x.transpose(1, 2)).view(batch, heads, num_queries, -1)
    shares = (scores if bias is None else scores + bias).softmax(-1)
    means = (shares.flatten(1, 2) @ x).view(batch, heads, num_queries, width)
    mixed = torch.einsum("bhqc,hdc->bqhd", means, of_v) + bias_v
    return mixed.flatten(2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: IntegerBlock, bias: Tensor | None) -> Tensor:
        ctx.block, attn, mlp = block, block.attn, block.mlp
        normed, mean1, rstd1 = torch.native_layer_norm(x, *_norm(block.norm1))
        mixed, *heads = _attend(_apply(attn.qkv, normed), attn.num_heads, bias)
        middle = _apply(attn.proj, mixed).add_(x)
        normed, mean2, rstd2 = torch.native_layer_norm(middle, *_norm(block.norm2))
        hidden = _apply(mlp.fc1, normed)
        activated = F.gelu(hidden, approximate=GELUS[mlp.activation])
        y = _apply(mlp.fc2, activated).add_(middle)
        ctx.save_for_backward(x, mean1, rstd1, *heads, middle, mean2, rstd2, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, mean1, rstd1, q, k, v, shares, middle, mean2, rstd2, hidden = ctx.saved_tensors
        attn, mlp, (gradient,) = ctx.block.attn, ctx.block.mlp, gradients
        rows, outer = _transposed(mlp.fc2, gradient)
        rows = aten.gelu_backward(rows, hidden, approximate=GELUS[mlp.activation])
        rows, scale = _transposed(mlp.fc1, rows, overwrite=True)
        rows = _norm_backward(rows, middle, mean2, rstd2)
        gradient = torch.addcmul(gradient, rows, scale.mul_(outer), out=rows)
        mixed, scale = _transposed(attn.proj, gradient)
        rows = _attend_backward(mixed.mul_(scale), q, k, v, shares)
        rows, scale = _transposed(attn.qkv, rows, overwrite=True)
        rows = _norm_backward(rows, x, mean1, rstd1)
        return torch.addcmul(gradient, rows, scale, out=rows), None, None


def _apply(product: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a layer, whose input is overwritten."""
    layer = cast(IntegerProduct, product)
    y, scale = multiply(x, layer.forward_weight, overwrite=True)
    return torch.addcmul(layer.bias, y, scale, out=y)


def _transposed(
    product: nn.Module, gradient: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the product with the transposed weight, and the scales of its rows."""
    layer = cast(IntegerProduct, product)
    return multiply(gradient, layer.backward_weight, overwrite=overwrite)


def _norm(module: nn.Module) -> tuple[tuple[int, ...], None, None, float]:
    norm = cast(nn.LayerNorm, module)
    return norm.normalized_shape, None, None, norm.eps


def _norm_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    result: Tensor = aten.native_layer_norm_backward(
        *(gradient, x, x.shape[-1:], mean, rstd, None, None, [True, False, False])
    )[0]
    return result


def _attend(qkv: Tensor, heads: int, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return the merged heads ``[B, T, H*D]``, and queries times the scale, keys, values and
    attention weights of all heads, ``[B*H, T, ...]``."""
    batch, tokens, _ = qkv.shape
    split = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (part.flatten(0, 1) for part in split)
    q.mul_(q.shape[-1] ** -0.5)
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores.add_(bias.expand(batch, -1, -1, -1).flatten(0, 1))
    shares = scores.softmax(-1)
    merged = torch.bmm(shares, v).view(batch, heads, tokens, -1).transpose(1, 2).flatten(2)
    return merged, q, k, v, shares


def _attend_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, shares: Tensor) -> Tensor:
    """Return the gradient ``[B, T, 3*H*D]`` of the input of :func:`_attend`."""
    batch, tokens, width = gradient.shape
    dim = q.shape[-1]
    heads = width // dim
    split = gradient.view(batch, tokens, heads, dim).transpose(1, 2).flatten(0, 1)
    scores = torch.bmm(split, v.transpose(1, 2))
    scores = torch._softmax_backward_data(scores, shares, -1, scores.dtype)
    dq = torch.bmm(scores, k).mul_(dim**-0.5)
    parts = [dq, torch.bmm(scores.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), split)]
    split = torch.stack([part.view(batch, heads, tokens, dim).transpose(1, 2) for part in parts], 2)
    return split.view(batch, tokens, 3 * width)
