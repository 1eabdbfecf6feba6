"""Position embeddings from files: the grid that they are of, and their values for another."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from dfq.errors import WeightsError
from dfq.vit.options import size_flag

POSITION_TABLES = ("pos_embed", "relative_position_bias_table")
"""Ends of the names of parameters whose length follows from the image size."""

CORNERS = 3
"""Entries of a table of relative positions for pairs with the class token."""

MOST_OBLONG = 8
"""Sides of grids that are thought of differ by at most this factor."""

LEAST_SMOOTH, CLEARLY = 0.3, 0.05
"""A grid is told from values where neighbours have at least this mean cosine, and this much more
than on the grid that was expected."""

MOST_SUGGESTED = 4

Grid = tuple[int, int]


def fit_positions(
    model: Any, key: str, theirs: Tensor, *, name: str, path: Path, resize: bool
) -> Tensor:
    """A file's table of positions for the grid of a model; resampled only with ``resize``.

    A table of as many entries as the model's is taken as it is, unless its values show another
    grid and the caller has not named the size (``resize``).  One of another length is taken for
    that of a square grid.

    Raises:
        WeightsError: the table is of another grid, and ``resize`` is off or the grid not square.
    """
    own: Tensor = model.get_parameter(key)
    if theirs.ndim != own.ndim or theirs.shape[-1] != own.shape[-1]:
        return theirs
    grid: Grid = tuple(model.patch_embed.grid_size)
    absolute = key == "pos_embed"
    patches = theirs[0, prefix_entries(model) :] if absolute else None
    if theirs.shape == own.shape:
        likely = grid if patches is None or resize else likely_grid(patches, grid)
        if likely != grid:
            raise _another_grid(model, likely, grid, name, path)
        return theirs
    side = _square_side(len(theirs) - CORNERS) if patches is None else math.isqrt(len(patches))
    if not side or (patches is not None and side**2 != len(patches)):
        raise _not_square(model, own, theirs, patches, name, path)
    source = (side, side)
    likely = source if patches is None else likely_grid(patches, source)
    if likely != source:
        raise _another_grid(model, likely, source, name, path)
    if not resize:
        raise WeightsError(
            f"{_another_size(model, own, theirs, name, path)}. Name the size that the weights were "
            f"trained at with --img-size, such as --img-size {_image_size(model, source)}."
        )
    if not absolute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return resize_rel_pos_bias_table(theirs, grid, tuple(own.shape), source)
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
    flexible = "flexi" in architecture  # as timm resamples them
    return resample_abs_pos_embed(
        theirs,
        new_size=list(grid),
        old_size=list(source),
        num_prefix_tokens=prefix_entries(model),
        interpolation="bilinear" if flexible else "bicubic",
        antialias=not flexible,
    )


def prefix_entries(model: Any) -> int:
    """How many entries of its position embedding are those of tokens before the patches."""
    return 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)


def _square_side(entries: int) -> int:
    """Side of the square grid with so many relative positions, ``(2 side - 1)^2``; 0 for none."""
    width = math.isqrt(max(entries, 0))
    return (width + 1) // 2 if width % 2 and width**2 == entries else 0


@torch.no_grad()
def likely_grid(table: Tensor, expected: Grid) -> Grid:
    """The grid on which position embeddings ``[N, C]`` vary most smoothly.

    Learnt embeddings of neighbours resemble each other, so a wrong width shows.
    ``expected`` unless another grid of as many patches is clearly smoother.
    """
    best = max(grids_of(len(table)), key=lambda grid: _smoothness(table, grid), default=expected)
    smoothness = _smoothness(table, best)
    clear = smoothness >= LEAST_SMOOTH and smoothness > _smoothness(table, expected) + CLEARLY
    return best if clear else expected


def grids_of(patches: int) -> list[Grid]:
    """Grids of so many patches, the squarest first."""
    heights = [h for h in range(1, patches + 1) if patches % h == 0]
    grids = [(h, patches // h) for h in heights]
    return sorted((g for g in grids if max(g) <= MOST_OBLONG * min(g)), key=max)


def _smoothness(table: Tensor, grid: Grid) -> float:
    """Mean cosine of neighbours, after the mean embedding has been subtracted."""
    values = F.normalize((table.float() - table.float().mean(0)).reshape(*grid, -1), dim=-1)
    down, right = values[1:] * values[:-1], values[:, 1:] * values[:, :-1]
    cosines = torch.cat([down.sum(-1).flatten(), right.sum(-1).flatten()])
    return float(cosines.mean()) if len(cosines) else 0.0


def _image_size(model: Any, grid: Grid) -> str:
    height, width = model.patch_embed.patch_size
    return size_flag((grid[0] * height, grid[1] * width))


def _another_size(model: Any, own: Tensor, theirs: Tensor, name: str, path: Path) -> str:
    height, width = model.patch_embed.grid_size
    return (
        f"{path.name!r} was trained at another image size than {name!r}: its position embedding "
        f"has {theirs.shape[-2]} entries, the model's {own.shape[-2]}, for {height} x {width} "
        "patches"
    )


def _another_grid(model: Any, likely: Grid, taken: Grid, name: str, path: Path) -> WeightsError:
    return WeightsError(
        f"The position embedding of {path.name!r} looks like that of {likely[0]} x {likely[1]} "
        f"patches, not {taken[0]} x {taken[1]}, for which {name!r} would take it. Name the size "
        f"that the weights were trained at: --img-size {_image_size(model, likely)}, or "
        f"--img-size {_image_size(model, taken)}."
    )


def _not_square(
    model: Any, own: Tensor, theirs: Tensor, patches: Tensor | None, name: str, path: Path
) -> WeightsError:
    text = f"{_another_size(model, own, theirs, name, path)}, and the image was not square"
    grids = [] if patches is None else grids_of(len(patches))[:MOST_SUGGESTED]
    if patches is not None and grids:
        likely = likely_grid(patches, grids[0])
        grids = [likely, *(grid for grid in grids if grid != likely)][:MOST_SUGGESTED]
    such = " or ".join(f"--img-size {_image_size(model, grid)}" for grid in grids)
    return WeightsError(
        f"{text}. Name the height and width that the weights were trained at, "
        f"{f'such as {such}' if such else '--img-size HEIGHT,WIDTH'}."
    )
