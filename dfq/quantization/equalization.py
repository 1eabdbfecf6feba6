"""Ranges by channel after layer norms, folded away so that run time stays per tensor."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dfq.quantization.calibration import Calibration
from dfq.quantization.quantizer import Quantizer
from dfq.vit import Architecture, ViT

NARROWEST = 1e-3
"""Channels are taken to span at least this share of the widest one."""


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

    Channel ``c`` with the observed middle ``m`` and half-width ``h`` becomes
    ``(x - m) / (h / H) ** strength``, with ``H`` the widest half-width: the layer norm's affine
    takes this on and the linear layer undoes it, so the function stays.  With ``strength`` 1
    every channel spans its own observed range, as in RepQ-ViT (arXiv 2212.08254, section 3.2);
    below 1 each has room of ``(H / h) ** (1 - strength)`` beyond what was observed.

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
        widest = half.max().clamp_min(1e-12)
        ratio = (half / widest).clamp(min=NARROWEST) ** strength
        _fold(norm, linear, middle, ratio)
        statistics[name] = found.moved(middle, ratio)
        quantizers[name] = _symmetric(float((half / ratio).max().clamp_min(1e-12)))
    return vit, Calibration(quantizers, statistics, calibration.images)


def _fold(norm: nn.LayerNorm, linear: nn.Linear, middle: Tensor, ratio: Tensor) -> None:
    linear.bias.add_(linear.weight @ middle)
    linear.weight.mul_(ratio)
    norm.bias.sub_(middle).div_(ratio)
    norm.weight.div_(ratio)


def _symmetric(half: float) -> Quantizer:
    """The uint8 quantizer of ``-half .. half``."""
    return Quantizer(half / 127.5, 128, signed=False)
