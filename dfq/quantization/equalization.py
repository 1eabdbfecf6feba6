"""Ranges by channel, folded into neighbouring layers so that run time stays per tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dfq.quantization.calibration import Calibration, InputStatistics
from dfq.quantization.scheme import ATTENTION_SITES
from dfq.runtime.qtype import MIN_SCALE, QParams, QType, qparams_from_range
from dfq.vit import Architecture, ViT

BAND = 4.0
"""Of a pair with ``outliers_only``, channels with ratios within so many times their median stay."""

SMALLEST = 1e-6
"""Half-widths and weights are taken to be at least this share of a layer's largest."""


@dataclass(frozen=True)
class ScalePair:
    """Channels that one layer writes and one linear layer alone reads, with only sums over tokens
    and products by channel between them.

    ``writer`` is a linear layer or a norm, of which rows ``first`` to ``first + width`` are meant.
    ``reader`` reads them once, or several times one after the other.  ``site`` is where 8-bit
    attention quantizes them.  With ``outliers_only`` channels like most others stay as they are.
    """

    writer: str
    reader: str
    width: int
    first: int = 0
    site: str = ""
    outliers_only: bool = True


def norm_layer_pairs(arch: Architecture) -> list[tuple[str, str]]:
    """Each layer norm whose output one linear layer alone reads, with that layer.

    The head's norm is one of :func:`scale_pairs`.
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


def scale_pairs(arch: Architecture) -> list[ScalePair]:
    """Where else the size of a channel can move from one layer into the next.

    Values of attention, which mixes tokens and not channels; values of gated MLPs, which their
    gates multiply; and the norm before the head, with which pooling commutes.
    """
    pairs, width = [], arch.attention_dim
    for i in range(arch.depth):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        if not arch.attn_norm:
            pairs.append(ScalePair(f"{attn}.qkv", f"{attn}.proj", width, 2 * width, f"{attn}.v"))
        if arch.gated_mlp and not arch.mlp_norm:
            hidden = arch.mlp_hidden
            pairs.append(ScalePair(f"{mlp}.fc1", f"{mlp}.fc2", hidden, hidden))
    if arch.pool == "map":
        width = arch.embed_dim
        pairs.append(ScalePair("attn_pool.kv", "attn_pool.proj", width, width))
    if arch.num_classes and arch.pooled_norm:
        pairs.append(ScalePair("fc_norm", "head", arch.embed_dim, outliers_only=False))
    elif arch.num_classes and arch.final_norm and arch.pool != "map":
        pairs.append(ScalePair("norm", "head", arch.embed_dim, outliers_only=False))
    return pairs


@torch.no_grad()
def equalize(vit: ViT, calibration: Calibration, strength: float) -> tuple[ViT, Calibration]:
    """Bring the channels of quantized inputs to more equal ranges, the function unchanged.

    Channel ``c`` with the observed half-width ``h``, and ``w`` the norm of the next layer's
    column for it, is divided by ``r = h ** s / w ** (1 - s)`` for the strength ``s``: the layer
    that writes it takes this on and the one that reads it undoes it.  With ``s = 1`` every channel
    spans its own observed range, as in RepQ-ViT (arXiv 2212.08254, section 3.2); below 1 channels
    that matter little have room beyond what was observed (SmoothQuant, arXiv 2211.10438, equation
    4).  For any ``s`` the result does not depend on how the model splits a channel's size between
    the two layers, but for the values below.

    After the norms of :func:`norm_layer_pairs` channels are also centred by the observed middle.
    Those of :func:`scale_pairs` are not, and ``h`` is their largest magnitude: by measurement
    (ViT-S) the room on their narrower side is worth more than the finer steps.  Of values only
    channels are scaled whose ``r`` is more than :data:`BAND` times from the median, and only back
    to that: scaling all costs 4-bit weights more than finer steps give.

    Queries and keys of 8-bit attention are scaled against each other, to equal ranges.

    Returns a changed copy of the model and the calibration that it would have given; both as
    they are if ``strength`` is 0.
    """
    if not strength:
        return vit, calibration
    vit = copy.deepcopy(vit)
    moved = Calibration(
        dict(calibration.quantizers),
        dict(calibration.statistics),
        calibration.images,
        dict(calibration.heads),
    )
    if moved.heads and not (vit.arch.qk_norm or vit.arch.rope):
        for i in range(vit.arch.depth):
            _balance(vit, f"blocks.{i}.", moved.heads, moved.quantizers)
    for pair in scale_pairs(vit.arch):
        _scale(vit, pair, moved, strength)
    for norm, linear in norm_layer_pairs(vit.arch):
        _centre_and_scale(vit, norm, linear, moved, strength)
    return vit, moved


def _scale(vit: ViT, pair: ScalePair, moved: Calibration, strength: float) -> None:
    writer = vit.get_submodule(pair.writer)
    reader = cast(nn.Linear, vit.get_submodule(pair.reader))
    before = moved.statistics[pair.reader]
    reach = before.reach.reshape(-1, pair.width).amax(0)
    column = reader.weight.norm(dim=0).reshape(-1, pair.width).norm(dim=0)
    ratio = _ratio(reach, column, strength)
    if pair.outliers_only:
        ratio = _beyond_band(ratio / ratio.median())
        if bool((ratio == 1).all()):
            return
    rows = slice(pair.first, pair.first + pair.width)
    for parameter in (cast(Tensor, writer.weight), cast(Tensor, writer.bias)):
        parameter[rows] /= ratio if parameter.ndim == 1 else ratio[:, None]
    repeated = ratio.repeat(len(before.low) // pair.width)
    reader.weight.mul_(repeated)
    _move(moved.statistics, moved.quantizers, pair.reader, repeated)
    if pair.site in moved.heads:
        _move(moved.heads, moved.quantizers, pair.site, ratio)


def _centre_and_scale(
    vit: ViT, norm_name: str, name: str, moved: Calibration, strength: float
) -> None:
    norm = cast(nn.LayerNorm, vit.get_submodule(norm_name))
    linear = cast(nn.Linear, vit.get_submodule(name))
    before = moved.statistics[name]
    middle, half = (before.high + before.low) / 2, (before.high - before.low) / 2
    ratio = _ratio(half, linear.weight.norm(dim=0), strength)
    linear.bias.add_(linear.weight @ middle)
    linear.weight.mul_(ratio)
    norm.bias.sub_(middle).div_(ratio)
    norm.weight.div_(ratio)
    _move(moved.statistics, moved.quantizers, name, ratio, middle)


def _ratio(half: Tensor, column: Tensor, strength: float) -> Tensor:
    half, column = _positive(half), _positive(column)
    return half**strength / column ** (1 - strength)


def _beyond_band(ratio: Tensor) -> Tensor:
    """What brings ratios into ``1 / BAND..BAND``; 1 for those that are there."""
    return ratio / ratio.clamp(1 / BAND, BAND)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(max(MIN_SCALE, SMALLEST * float(x.max())))


def _move(
    statistics: dict[str, InputStatistics],
    quantizers: dict[str, QParams],
    name: str,
    ratio: Tensor,
    middle: Tensor | None = None,
) -> None:
    """Have statistics and the quantizer of a site be those of ``(x - middle) / ratio``."""
    middle = torch.zeros_like(ratio) if middle is None else middle
    statistics[name] = statistics[name].moved(middle, ratio)
    quantizers[name] = _quantizer(statistics[name], quantizers[name].qtype)


def _quantizer(found: InputStatistics, qtype: QType) -> QParams:
    return qparams_from_range(float(found.low.min()), float(found.high.max()), qtype)


def _balance(
    vit: ViT, block: str, heads: dict[str, InputStatistics], quantizers: dict[str, QParams]
) -> None:
    """Divide each channel of the queries by what its keys are multiplied with."""
    sites = [block + site for site in ATTENTION_SITES[:2]]
    q, k = (_positive(heads[site].reach) for site in sites)
    linear = cast(nn.Linear, vit.get_submodule(f"{block}attn.qkv"))
    width = len(q)
    for index, (site, ratio) in enumerate(
        zip(sites, ((q / k).sqrt(), (k / q).sqrt()), strict=True)
    ):
        rows = slice(index * width, (index + 1) * width)
        linear.weight[rows] /= ratio[:, None]
        linear.bias[rows] /= ratio
        _move(heads, quantizers, site, ratio)
