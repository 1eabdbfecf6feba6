"""Units of the optimized values, in which their standard deviation is near 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dfq.sparse import Grid, Normalization, channel_values
from dfq.vit import Preprocessing, ViT
from dfq.vit.preprocessing import LEVELS, SLACK

MIN_STD = 1 / 16
"""Least std of normalized data, in widths of the input range; photographs have about 1/4."""

DEFAULT_MEAN, DEFAULT_STD = 0.5, 0.25
"""Assumed mean and std of data that the network does not normalize."""


@dataclass(frozen=True)
class Units:
    """Units of values ``(level / 255 - level_mean) / level_std``, as in a ``Preprocessing``."""

    level_mean: tuple[float, ...]
    level_std: tuple[float, ...]


def units_of(preprocessing: Preprocessing) -> Normalization:
    """Return the network's own units if its input is normalized, else those of the input range.

    A network that takes 0..255 or physical values as they come has an input whose spread is not
    near 1 or whose middle is far from 0: standard normal noise would lie on one edge of its range,
    and steps of a fixed size would not cross it.
    """
    slack = SLACK / LEVELS
    spread = all(MIN_STD <= std <= 1 + slack for std in preprocessing.level_std)
    centered = all(-slack <= mean <= 1 + slack for mean in preprocessing.level_mean)
    if spread and centered:
        return preprocessing
    channels = len(preprocessing.mean)
    return Units((DEFAULT_MEAN,) * channels, (DEFAULT_STD,) * channels)


@torch.no_grad()
def fold_units(vit: ViT, own: Normalization, units: Normalization, grid: Grid) -> None:
    """Fold a change of units into the patch embedding, so that it takes input in ``units``."""
    embed = vit.patch_embed
    assert isinstance(embed, nn.Linear)
    values = (own.level_mean, own.level_std, units.level_mean, units.level_std)
    mean, std, new_mean, new_std = (
        channel_values(v, grid).to(embed.weight.device, torch.float64) for v in values
    )
    weight = embed.weight.double()
    embed.bias.copy_(embed.bias.double() + weight @ ((new_mean - mean) / std))
    embed.weight.copy_(weight * (new_std / std))
