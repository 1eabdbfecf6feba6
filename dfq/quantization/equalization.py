"""Cross-layer equalization: per-channel ranges, folded into the neighboring layers.

Quantization of activations stays per tensor at run time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dfq.quantization.calibration import Calibration, InputStatistics
from dfq.quantization.scheme import ATTENTION_INPUTS
from dfq.runtime.qtype import MIN_SCALE, QParams, QType, qparams_from_range
from dfq.vit import Architecture, ViT

OUTLIER_FACTOR = 4.0
"""With ``outliers_only``, a channel is scaled only if its scale differs from the median by more
than this factor."""

MIN_SHARE = 1e-6
"""Half-ranges and weight norms are clamped to at least this share of the layer's largest."""


@dataclass(frozen=True)
class ScalePair:
    """Two layers between which per-channel scales can be moved.

    Between them are only sums over tokens and products per channel, and no other layer reads the
    channels.  ``writer``: a linear layer or a norm; its output rows ``first`` to ``first + width``
    are meant.  ``reader``: a linear layer whose inputs are these channels, once or repeated.
    ``activation``: name of the activation that 8-bit attention quantizes, if any.
    ``outliers_only``: scale only outlier channels (:data:`OUTLIER_FACTOR`).
    """

    writer: str
    reader: str
    width: int
    first: int = 0
    activation: str = ""
    outliers_only: bool = True


def norm_linear_pairs(arch: Architecture) -> list[tuple[str, str]]:
    """Return each layer norm that a single linear layer reads, with that layer.

    The norm before the head is in :func:`scale_pairs`.
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
    """Return the other pairs of layers between which channels can be scaled.

    These are the values of attention, which mixes tokens but not channels; the values of gated
    MLPs; and the norm before the head, which commutes with pooling.
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
    """Equalize the ranges of the channels of quantized activations; the function stays the same.

    A channel with observed half-range ``h``, whose column of the next layer has norm ``w``, is
    divided by ``r = h ** s / w ** (1 - s)``, where ``s`` is the strength: the writing layer is
    divided by ``r``, the reading layer multiplied.  With ``s = 1`` every channel spans its own
    observed range, as in RepQ-ViT (arXiv 2212.08254, section 3.2); below 1 channels with small
    weights get headroom beyond the observed range (SmoothQuant, arXiv 2211.10438, equation 4).  For
    any ``s`` the result does not depend on how the model splits a channel's scale between the two
    layers, except for attention values (below).

    After the norms of :func:`norm_linear_pairs` channels are also centered on the middle of their
    range. Those of :func:`scale_pairs` are not centered, and their ``h`` is the largest magnitude:
    on ViT-S, headroom on the narrower side is worth more than a finer scale.  Attention and MLP
    values are scaled only where ``r`` differs from its median by more than :data:`OUTLIER_FACTOR`,
    and only back to that factor: scaling all of them costs 4-bit weights more than the finer scale
    gains.

    Queries and keys of 8-bit attention are scaled against each other, to equal ranges.

    Returns a modified copy of the model, and the calibration that it would have given; both
    unchanged if ``strength`` is 0.
    """
    if not strength:
        return vit, calibration
    vit = copy.deepcopy(vit)
    equalized = Calibration(
        dict(calibration.qparams),
        dict(calibration.statistics),
        calibration.images,
        dict(calibration.attention_statistics),
    )
    if equalized.attention_statistics and not (vit.arch.qk_norm or vit.arch.rope):
        for i in range(vit.arch.depth):
            _equalize_queries_and_keys(
                vit, f"blocks.{i}.", equalized.attention_statistics, equalized.qparams
            )
    for pair in scale_pairs(vit.arch):
        _equalize_pair(vit, pair, equalized, strength)
    for norm, linear in norm_linear_pairs(vit.arch):
        _center_and_scale(vit, norm, linear, equalized, strength)
    return vit, equalized


def _equalize_pair(vit: ViT, pair: ScalePair, equalized: Calibration, strength: float) -> None:
    writer = vit.get_submodule(pair.writer)
    reader = cast(nn.Linear, vit.get_submodule(pair.reader))
    before = equalized.statistics[pair.reader]
    max_abs = before.max_abs.reshape(-1, pair.width).amax(0)
    column = reader.weight.norm(dim=0).reshape(-1, pair.width).norm(dim=0)
    scale = _channel_scale(max_abs, column, strength)
    if pair.outliers_only:
        scale = _outlier_scale(scale / scale.median())
        if bool((scale == 1).all()):
            return
    rows = slice(pair.first, pair.first + pair.width)
    for parameter in (cast(Tensor, writer.weight), cast(Tensor, writer.bias)):
        parameter[rows] /= scale if parameter.ndim == 1 else scale[:, None]
    repeated = scale.repeat(len(before.low) // pair.width)
    reader.weight.mul_(repeated)
    _normalize_statistics(equalized.statistics, equalized.qparams, pair.reader, repeated)
    if pair.activation in equalized.attention_statistics:
        _normalize_statistics(
            equalized.attention_statistics, equalized.qparams, pair.activation, scale
        )


def _center_and_scale(
    vit: ViT, norm_name: str, name: str, equalized: Calibration, strength: float
) -> None:
    norm = cast(nn.LayerNorm, vit.get_submodule(norm_name))
    linear = cast(nn.Linear, vit.get_submodule(name))
    before = equalized.statistics[name]
    center, half = (before.high + before.low) / 2, (before.high - before.low) / 2
    scale = _channel_scale(half, linear.weight.norm(dim=0), strength)
    linear.bias.add_(linear.weight @ center)
    linear.weight.mul_(scale)
    norm.bias.sub_(center).div_(scale)
    norm.weight.div_(scale)
    _normalize_statistics(equalized.statistics, equalized.qparams, name, scale, center)


def _channel_scale(half: Tensor, column: Tensor, strength: float) -> Tensor:
    half, column = _positive(half), _positive(column)
    return half**strength / column ** (1 - strength)


def _outlier_scale(scale: Tensor) -> Tensor:
    """Return the factor by which scales exceed ``1 / OUTLIER_FACTOR..OUTLIER_FACTOR``; else 1."""
    return scale / scale.clamp(1 / OUTLIER_FACTOR, OUTLIER_FACTOR)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(max(MIN_SCALE, MIN_SHARE * float(x.max())))


def _normalize_statistics(
    statistics: dict[str, InputStatistics],
    qparams: dict[str, QParams],
    name: str,
    scale: Tensor,
    center: Tensor | None = None,
) -> None:
    """Replace the statistics and qparams of an activation by those of ``(x - center) / scale``."""
    center = torch.zeros_like(scale) if center is None else center
    statistics[name] = statistics[name].normalized(center, scale)
    qparams[name] = _qparams(statistics[name], qparams[name].qtype)


def _qparams(statistics: InputStatistics, qtype: QType) -> QParams:
    return qparams_from_range(float(statistics.low.min()), float(statistics.high.max()), qtype)


def _equalize_queries_and_keys(
    vit: ViT,
    block: str,
    attention_statistics: dict[str, InputStatistics],
    qparams: dict[str, QParams],
) -> None:
    """Scale each channel of queries and keys inversely, so that their ranges are equal."""
    activations = [block + activation for activation in ATTENTION_INPUTS[:2]]
    q, k = (_positive(attention_statistics[activation].max_abs) for activation in activations)
    linear = cast(nn.Linear, vit.get_submodule(f"{block}attn.qkv"))
    width = len(q)
    for index, (activation, scale) in enumerate(
        zip(activations, ((q / k).sqrt(), (k / q).sqrt()), strict=True)
    ):
        rows = slice(index * width, (index + 1) * width)
        linear.weight[rows] /= scale[:, None]
        linear.bias[rows] /= scale
        _normalize_statistics(attention_statistics, qparams, activation, scale)
