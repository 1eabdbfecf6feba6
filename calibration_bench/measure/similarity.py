"""Similarity of images, of rankings, and of activation statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.vit import ViT

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""Constants of SSIM for pixels 0..255 (Wang et al., IEEE TIP 13, 600, 2004)."""


def psnr(a: Tensor, b: Tensor) -> float | None:
    """Return the peak signal-to-noise ratio of pixels 0..255 in dB; None for equal images,
    where it is infinite."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else None


def ssim(a: Tensor, b: Tensor) -> float:
    """Return the mean structural similarity of patches ``[..., D]``, one window per patch."""
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    var_a, var_b = a.var(-1, correction=0), b.var(-1, correction=0)
    both = (a * b).mean(-1) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return float((luminance * (2 * both + C2) / (var_a + var_b + C2)).mean())


def ranks(x: Tensor) -> Tensor:
    """Return the ranks of a vector from 1, float64; equal values get their mean rank."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation of two vectors; None if one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else None


@dataclass
class Moments:
    """Moments of a layer's input: count, and per feature sum, sum of squares and range."""

    count: int
    total: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp_min(0)

    def add(self, x: Tensor) -> None:
        """Add inputs ``[rows, features]``."""
        wide = x.double()
        self.count += len(x)
        self.total += wide.sum(0)
        self.squares += wide.square().sum(0)
        self.low = torch.minimum(self.low, wide.amin(0))
        self.high = torch.maximum(self.high, wide.amax(0))


@torch.no_grad()
def input_moments(vit: ViT, inputs: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, Moments]:
    """Return the moments of the input of every linear layer in the blocks.

    ``inputs``: patches ``[B, L, D]`` and their positions."""
    moments: dict[str, Moments] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2)
            if name not in moments:
                empty = torch.zeros(x.shape[1], dtype=torch.float64)
                moments[name] = Moments(
                    0, empty, empty.clone(), empty + torch.inf, empty - torch.inf
                )
            moments[name].add(x)

        return hook

    layers = [(n, m) for n, m in vit.blocks.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers]
    try:
        for patches, positions in inputs:
            vit.tokens(patches, positions)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def distances(moments: Moments, real: Moments) -> dict[str, float]:
    """Return the distances of a layer's statistics from those of real images.

    ``mean``: length of the difference of means over that of real standard deviations.
    ``variance`` and ``range``: sum over features of absolute differences over the sum of
    the real ones.  ``outside``: the part of the real ranges, over all features, that is not
    inside.
    """
    span, real_span = moments.high - moments.low, real.high - real.low
    inside = (
        torch.minimum(moments.high, real.high) - torch.maximum(moments.low, real.low)
    ).clamp_min(0)
    return {
        "mean": float((moments.mean - real.mean).norm() / real.variance.sum().sqrt()),
        "variance": float(
            (moments.variance - real.variance).abs().sum() / real.variance.abs().sum()
        ),
        "range": float((span - real_span).abs().sum() / real_span.sum()),
        "outside": float(1 - inside.sum() / real_span.sum()),
    }
