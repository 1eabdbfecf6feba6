"""Ranges by channel after layer norms, folded away so that run time stays per tensor."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dfq.quantization.calibration import Calibration
from dfq.quantization.quantizer import Quantizer
from dfq.vit import Architecture, ViT

SMALLEST = 1e-6
"""Half-widths and weights are taken to be at least this share of a layer's largest."""


def norm_layer_pairs(arch: Architecture) -> list[tuple[str, str]]:
    """Each layer norm whose output one linear layer alone reads, with that layer."""
    pairs = []
    for i in range(arch.depth):
        pairs += [(f"blocks.{i}.norm1", f"blocks.{i}.attn.qkv")]
        pairs += [(f"blocks.{i}.norm2", f"blocks.{i}.mlp.fc1")]
    return pairs


@torch.no_grad()
def equalize(vit: ViT, calibration: Calibration, strength: float | None) -> tuple[ViT, Calibration]:
    """Bring the channels after each layer norm to more equal ranges.

    Channel ``c`` with the observed middle ``m`` and half-width ``h``, and ``w`` the norm of the
    next layer's column for it, becomes ``(x - m) / r`` with ``r = h ** s / w ** (1 - s)`` for the
    strength ``s``: the layer norm's affine takes this on and the linear layer undoes it, so the
    function stays.  With ``s = 1`` every channel spans its own observed range, as in RepQ-ViT
    (arXiv 2212.08254, section 3.2); below 1 channels that matter little have room beyond what
    was observed (SmoothQuant, arXiv 2211.10438, equation 4).  For any ``s`` the result does not
    depend on how the model splits a channel's size between the norm and the next layer.

    Returns a changed copy of the model and the calibration that it would have given; both as
    they are if ``strength`` is 0.
    """
    if not strength:
        return vit, calibration
    vit = copy.deepcopy(vit)
    quantizers, statistics = dict(calibration.quantizers), dict(calibration.statistics)
    for norm_name, name in norm_layer_pairs(vit.arch):
        norm = cast(nn.LayerNorm, vit.get_submodule(norm_name))
        linear = cast(nn.Linear, vit.get_submodule(name))
        found = statistics[name]
        middle, half = (found.high + found.low) / 2, (found.high - found.low) / 2
        ratio = _ratio(half, linear.weight.norm(dim=0), strength)
        _fold(norm, linear, middle, ratio)
        statistics[name] = found.moved(middle, ratio)
        quantizers[name] = _symmetric(float((half / ratio).max().clamp_min(1e-12)))
    return vit, Calibration(quantizers, statistics, calibration.images)


def _ratio(half: Tensor, column: Tensor, strength: float) -> Tensor:
    half, column = _positive(half), _positive(column)
    ratio = half**strength / column ** (1 - strength)
    return ratio / ratio.log().mean().exp()


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(max(1e-12, SMALLEST * float(x.max())))


def _fold(norm: nn.LayerNorm, linear: nn.Linear, middle: Tensor, ratio: Tensor) -> None:
    linear.bias.add_(linear.weight @ middle)
    linear.weight.mul_(ratio)
    norm.bias.sub_(middle).div_(ratio)
    norm.weight.div_(ratio)


def _symmetric(half: float) -> Quantizer:
    """The uint8 quantizer of ``-half .. half``."""
    return Quantizer(half / 127.5, 128, signed=False)
