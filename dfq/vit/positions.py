"""Position embeddings from files: detection of their grid, and resampling to another."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from dfq.argument_names import option
from dfq.errors import WeightsError
from dfq.vit.options import size_value

POSITION_TABLES = ("pos_embed", "relative_position_bias_table")
"""Endings of names of parameters whose length depends on the image size."""

CLASS_TOKEN_ENTRIES = 3
"""Entries of a table of relative positions for pairs with the class token."""

MAX_ASPECT_RATIO = 8
"""Largest aspect ratio of the grids that are considered."""

MIN_SMOOTHNESS, MIN_GAIN = 0.3, 0.05
"""Smallest mean cosine of neighbors on a detected grid, and its smallest gain over the expected
grid."""

MAX_SUGGESTIONS = 4

Grid = tuple[int, int]


def adapt_positions(
    model: Any, key: str, table: Tensor, *, name: str, path: Path, resize: bool
) -> Tensor:
    """Adapt a file's table of positions to the grid of a model.

    A table of the model's length is returned unchanged, unless its values suggest another grid and
    the caller did not give the image size (``resize``).  A table of another length is assumed to
    be of a square grid and resampled, with ``resize`` only.

    Raises:
        WeightsError: the table is of another grid, and ``resize`` is False or the grid not square.
    """
    own: Tensor = model.get_parameter(key)
    if table.ndim != own.ndim or table.shape[-1] != own.shape[-1]:
        return table
    grid: Grid = tuple(model.patch_embed.grid_size)
    absolute = key == "pos_embed"
    patches = table[0, prefix_entries(model) :] if absolute else None
    if table.shape == own.shape:
        likely = grid if patches is None or resize else likely_grid(patches, grid)
        if likely != grid:
            raise _another_grid(model, likely, grid, name, path)
        return table
    side = (
        _square_side(len(table) - CLASS_TOKEN_ENTRIES)
        if patches is None
        else math.isqrt(len(patches))
    )
    if not side or (patches is not None and side**2 != len(patches)):
        raise _not_square(model, own, table, patches, name, path)
    source = (side, side)
    likely = source if patches is None else likely_grid(patches, source)
    if likely != source:
        raise _another_grid(model, likely, source, name, path)
    if not resize:
        raise WeightsError(
            f"{_another_size(model, own, table, name, path)}. Name the size that the weights were "
            f"trained at, such as {_image_size(model, source)}."
        )
    if not absolute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return resize_rel_pos_bias_table(table, grid, tuple(own.shape), source)
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
    flexible = "flexi" in architecture  # as timm resamples them
    return resample_abs_pos_embed(
        table,
        new_size=list(grid),
        old_size=list(source),
        num_prefix_tokens=prefix_entries(model),
        interpolation="bilinear" if flexible else "bicubic",
        antialias=not flexible,
    )


def prefix_entries(model: Any) -> int:
    """Return the number of prefix tokens in a model's position embedding."""
    return 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)


def _square_side(entries: int) -> int:
    """Return the side of the square grid with ``(2 side - 1)^2 == entries``; 0 if there is none."""
    width = math.isqrt(max(entries, 0))
    return (width + 1) // 2 if width % 2 and width**2 == entries else 0


@torch.no_grad()
def likely_grid(table: Tensor, expected: Grid) -> Grid:
    """Return the grid on which position embeddings ``[N, C]`` vary most smoothly.

    Learned embeddings of neighbors are similar, so a wrong width can be detected.  Returns
    ``expected`` unless another grid with as many patches is clearly smoother.
    """
    best = max(grids_of(len(table)), key=lambda grid: _smoothness(table, grid), default=expected)
    smoothness = _smoothness(table, best)
    clear = smoothness >= MIN_SMOOTHNESS and smoothness > _smoothness(table, expected) + MIN_GAIN
    return best if clear else expected


def grids_of(patches: int) -> list[Grid]:
    """Return all grids with this number of patches, the squarest first."""
    heights = [h for h in range(1, patches + 1) if patches % h == 0]
    grids = [(h, patches // h) for h in heights]
    return sorted((g for g in grids if max(g) <= MAX_ASPECT_RATIO * min(g)), key=max)


def _smoothness(table: Tensor, grid: Grid) -> float:
    """Return the mean cosine of neighbors, after subtracting the mean embedding."""
    values = F.normalize((table.float() - table.float().mean(0)).reshape(*grid, -1), dim=-1)
    down, right = values[1:] * values[:-1], values[:, 1:] * values[:, :-1]
    cosines = torch.cat([down.sum(-1).flatten(), right.sum(-1).flatten()])
    return float(cosines.mean()) if len(cosines) else 0.0


def _image_size(model: Any, grid: Grid) -> str:
    """Return the argument that gives a model images of a grid of patches."""
    height, width = model.patch_embed.patch_size
    return option("img_size", size_value((grid[0] * height, grid[1] * width)))


def _another_size(model: Any, own: Tensor, table: Tensor, name: str, path: Path) -> str:
    height, width = model.patch_embed.grid_size
    return (
        f"{path.name!r} was trained at another image size than {name!r}: its position embedding "
        f"has {table.shape[-2]} entries, the model's {own.shape[-2]}, for {height} x {width} "
        "patches"
    )


def _another_grid(model: Any, likely: Grid, taken: Grid, name: str, path: Path) -> WeightsError:
    return WeightsError(
        f"The position embedding of {path.name!r} looks like that of {likely[0]} x {likely[1]} "
        f"patches, not {taken[0]} x {taken[1]}, for which {name!r} would take it. Name the size "
        f"that the weights were trained at: {_image_size(model, likely)}, or "
        f"{_image_size(model, taken)}."
    )


def _not_square(
    model: Any, own: Tensor, table: Tensor, patches: Tensor | None, name: str, path: Path
) -> WeightsError:
    text = f"{_another_size(model, own, table, name, path)}, and the image was not square"
    grids = [] if patches is None else grids_of(len(patches))[:MAX_SUGGESTIONS]
    if patches is not None and grids:
        likely = likely_grid(patches, grids[0])
        grids = [likely, *(grid for grid in grids if grid != likely)][:MAX_SUGGESTIONS]
    such = " or ".join(_image_size(model, grid) for grid in grids)
    return WeightsError(
        f"{text}. Name the height and width that the weights were trained at, "
        f"{f'such as {such}' if such else option('img_size', metavar='HEIGHT,WIDTH')}."
    )
