"""Ranges by channel, folded into neighbouring layers so that run time stays per tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dfq.quantization.calibration import Calibration, InputStatistics
from dfq.quantization.histogram import quantizer_of
from dfq.quantization.quantizer import Quantizer
from dfq.quantization.scheme import ATTENTION_SITES
from dfq.vit import Architecture, ViT

SMALLEST = 1e-6
"""Half-widths and weights are taken to be at least this share of a layer's largest."""


@dataclass(frozen=True)
class Fold:
    """A linear layer whose input channels can be moved and scaled by what makes them.

    ``source`` is a layer norm, or a linear layer of whose outputs the last ``1 / share`` reach
    ``layer`` channel by channel; ``shift`` says whether they may be moved as well as scaled.
    """

    source: str
    layer: str
    share: int = 1
    shift: bool = True


def folds(arch: Architecture) -> list[Fold]:
    """Every fold of an architecture, in the order of the forward pass.

    Values may be moved because attention's weights sum to 1.
    """
    found = []
    for i in range(arch.depth):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        found.append(Fold(f"blocks.{i}.norm1", f"{attn}.qkv"))
        if arch.attn_norm:
            found.append(Fold(f"{attn}.norm", f"{attn}.proj"))
        else:
            found.append(Fold(f"{attn}.qkv", f"{attn}.proj", share=3))
        found.append(Fold(f"blocks.{i}.norm2", f"{mlp}.fc1"))
        if arch.mlp_norm:
            found.append(Fold(f"{mlp}.norm", f"{mlp}.fc2"))
        elif arch.gated_mlp:
            found.append(Fold(f"{mlp}.fc1", f"{mlp}.fc2", share=2, shift=False))
    if arch.pool == "map":
        if arch.final_norm:
            found.append(Fold("norm", "attn_pool.kv"))
        found.append(Fold("attn_pool.kv", "attn_pool.proj", share=2))
        found.append(Fold("attn_pool.norm", "attn_pool.mlp.fc1"))
    if arch.num_classes and arch.pooled_norm:
        found.append(Fold("fc_norm", "head"))
    elif arch.num_classes and arch.final_norm and arch.pool in ("token", "avg"):
        found.append(Fold("norm", "head"))
    return found


@torch.no_grad()
def equalize(vit: ViT, calibration: Calibration, strength: float) -> tuple[ViT, Calibration]:
    """Bring the channels of layers' inputs to more equal ranges where that can be folded away.

    Channel ``c`` with the observed middle ``m`` and half-width ``h``, and ``w`` the norm of the
    layer's column for it, becomes ``(x - m) / r`` with ``r = h ** s / w ** (1 - s)`` for the
    strength ``s``: what makes the channel (:func:`folds`) takes this on and the linear layer
    undoes it, so the function stays.  With ``s = 1`` every channel spans its own observed range,
    as in RepQ-ViT (arXiv 2212.08254, section 3.2); below 1 channels that matter little have room
    beyond what was observed (SmoothQuant, arXiv 2211.10438, equation 4).  For any ``s`` the
    result does not depend on how the model splits a channel's size between two layers.

    Queries and keys of 8-bit attention are scaled against each other likewise.

    Returns a changed copy of the model and the calibration that it would have given; both as
    they are if ``strength`` is 0.
    """
    if not strength:
        return vit, calibration
    vit = copy.deepcopy(vit)
    quantizers, statistics = dict(calibration.quantizers), dict(calibration.statistics)
    heads = dict(calibration.heads)
    if heads and not (vit.arch.qk_norm or vit.arch.rope):
        for i in range(vit.arch.depth):
            _balance(vit, f"blocks.{i}.", heads, quantizers)
    for fold in reversed(folds(vit.arch)):  # a layer's outputs before its inputs
        linear = cast(nn.Linear, vit.get_submodule(fold.layer))
        found = statistics[fold.layer]
        middle, half = _span(found) if fold.shift else _reach(found)
        ratio = _ratio(half, linear.weight.norm(dim=0), strength)
        weight, bias = _outputs(vit.get_submodule(fold.source), fold.share)
        _divide(weight, bias.sub_(middle), ratio)
        linear.bias.add_(linear.weight @ middle)
        linear.weight.mul_(ratio)
        statistics[fold.layer] = found.moved(middle, ratio)
        quantizers[fold.layer] = _quantizer(statistics[fold.layer], signed=False)
        site = fold.layer.replace(".proj", ".v")
        if site in heads:
            heads[site] = heads[site].moved(middle, ratio)
            quantizers[site] = _quantizer(heads[site], signed=True)
    return vit, Calibration(quantizers, statistics, calibration.images, heads)


def _outputs(source: nn.Module, share: int) -> tuple[Tensor, Tensor]:
    """Views of weight and bias of the last ``1 / share`` of a layer's outputs."""
    weight, bias = cast(Tensor, source.weight), cast(Tensor, source.bias)
    first = len(weight) - len(weight) // share
    return weight[first:], bias[first:]


def _divide(weight: Tensor, bias: Tensor, ratio: Tensor) -> None:
    bias.div_(ratio)
    weight.div_(ratio if weight.dim() == 1 else ratio[:, None])


def _span(found: InputStatistics) -> tuple[Tensor, Tensor]:
    """Middle and half-width of each channel."""
    return (found.high + found.low) / 2, (found.high - found.low) / 2


def _reach(found: InputStatistics) -> tuple[Tensor, Tensor]:
    """0 and the largest magnitude of each channel."""
    return torch.zeros_like(found.low), torch.maximum(found.low.abs(), found.high.abs())


def _ratio(half: Tensor, column: Tensor, strength: float) -> Tensor:
    half, column = _positive(half), _positive(column)
    return half**strength / column ** (1 - strength)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(max(1e-12, SMALLEST * float(x.max())))


def _quantizer(found: InputStatistics, *, signed: bool) -> Quantizer:
    return quantizer_of(float(found.low.min()), float(found.high.max()), signed)


def _balance(
    vit: ViT, block: str, heads: dict[str, InputStatistics], quantizers: dict[str, Quantizer]
) -> None:
    """Scale each channel of the queries down and of the keys up, to the same range."""
    q_site, k_site = (block + site for site in ATTENTION_SITES[:2])
    q, k = (_positive(_reach(heads[site])[1]) for site in (q_site, k_site))
    ratio = (q / k).sqrt()
    linear = cast(nn.Linear, vit.get_submodule(f"{block}attn.qkv"))
    width = len(ratio)
    for start, factor, site in ((0, ratio, q_site), (width, 1 / ratio, k_site)):
        rows = slice(start, start + width)
        _divide(linear.weight[rows], linear.bias[rows], factor)
        heads[site] = heads[site].moved(torch.zeros_like(factor), factor)
        quantizers[site] = _quantizer(heads[site], signed=True)
