"""Random rolls and flips of whole patches, exact on any subset of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.sparse import Grid


def move_table(grid: Grid, down: int, right: int, flip: bool) -> Tensor:
    """Return the new position of each patch, int64 ``[N]``: rolled, then mirrored."""
    rows = (torch.arange(grid.rows) + down) % grid.rows
    columns = (torch.arange(grid.columns) + right) % grid.columns
    if flip:
        columns = grid.columns - 1 - columns
    return (rows[:, None] * grid.columns + columns).flatten()


Move = tuple[int, int, bool]
"""(down, right, mirrored), in patches."""


def mirror(patches: Tensor, grid: Grid) -> Tensor:
    """Mirror the pixels inside each patch ``[B, L, D]`` left to right; its own inverse."""
    shape = patches.shape
    return patches.reshape(*shape[:2], -1, grid.patch_size[1]).flip(-1).reshape(shape)


def draw(grid: Grid, share: float, flip: bool, generator: torch.Generator) -> Move:
    """Draw a random move of at most ``share`` of the side."""
    limits = [int(share * side) for side in (grid.rows, grid.columns)]
    down, right = (
        int(torch.randint(-limit, limit + 1, (), generator=generator)) for limit in limits
    )
    coin = bool(torch.rand((), generator=generator) < 0.5)
    return down, right, flip and coin
