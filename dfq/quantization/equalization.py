"""Ranges by channel, folded into neighbouring layers so that run time stays per tensor."""

from __future__ import annotations

import copy
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


def norm_layer_pairs(arch: Architecture) -> list[tuple[str, str]]:
    """Each layer norm whose output one linear layer alone reads, with that layer.

    The head is left out: there room for what calibration did not see is worth more than finer
    steps, by measurement.
    """
    pairs = []
    for i in range(arch.depth):
        block = f"blocks.{i}"
        pairs += [(f"{block}.norm1", f"{block}.attn.qkv"), (f"{block}.norm2", f"{block}.mlp.fc1")]
        if arch.attn_norm:
            pairs.append((f"{block}.attn.norm", f"{block}.attn.proj"))
        if arch.mlp_norm:
            pairs.append((f"{block}.mlp.norm", f"{block}.mlp.fc2"))
    if arch.pool == "map":
        if arch.final_norm:
            pairs.append(("norm", "attn_pool.kv"))
        pairs.append(("attn_pool.norm", "attn_pool.mlp.fc1"))
    return pairs


@torch.no_grad()
def equalize(vit: ViT, calibration: Calibration, strength: float) -> tuple[ViT, Calibration]:
    """Bring the channels after each layer norm to more equal ranges.

    Channel ``c`` with the observed middle ``m`` and half-width ``h``, and ``w`` the norm of the
    next layer's column for it, becomes ``(x - m) / r`` with ``r = h ** s / w ** (1 - s)`` for the
    strength ``s``: the norm's affine takes this on and the linear layer undoes it, so the
    function stays.  With ``s = 1`` every channel spans its own observed range, as in RepQ-ViT
    (arXiv 2212.08254, section 3.2); below 1 channels that matter little have room beyond what
    was observed (SmoothQuant, arXiv 2211.10438, equation 4).  For any ``s`` the result does not
    depend on how the model splits a channel's size between the norm and the next layer.

    Queries and keys of 8-bit attention are scaled against each other, to equal ranges.

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
    for norm_name, name in norm_layer_pairs(vit.arch):
        norm = cast(nn.LayerNorm, vit.get_submodule(norm_name))
        linear = cast(nn.Linear, vit.get_submodule(name))
        found = statistics[name]
        middle, half = (found.high + found.low) / 2, (found.high - found.low) / 2
        ratio = _ratio(half, linear.weight.norm(dim=0), strength)
        linear.bias.add_(linear.weight @ middle)
        linear.weight.mul_(ratio)
        norm.bias.sub_(middle).div_(ratio)
        norm.weight.div_(ratio)
        statistics[name] = found.moved(middle, ratio)
        quantizers[name] = _quantizer(statistics[name], signed=False)
    return vit, Calibration(quantizers, statistics, calibration.images, heads)


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
    """Divide each channel of the queries by what its keys are multiplied with."""
    sites = [block + site for site in ATTENTION_SITES[:2]]
    q, k = (_positive(_reach(heads[site])) for site in sites)
    linear = cast(nn.Linear, vit.get_submodule(f"{block}attn.qkv"))
    width = len(q)
    for index, (site, ratio) in enumerate(
        zip(sites, ((q / k).sqrt(), (k / q).sqrt()), strict=True)
    ):
        rows = slice(index * width, (index + 1) * width)
        linear.weight[rows] /= ratio[:, None]
        linear.bias[rows] /= ratio
        heads[site] = heads[site].moved(torch.zeros_like(ratio), ratio)
        quantizers[site] = _quantizer(heads[site], signed=True)


def _reach(found: InputStatistics) -> Tensor:
    """The largest magnitude of each channel."""
    return torch.maximum(found.low.abs(), found.high.abs())
