"""What attention knows of where patches are: rotations, and biases by relative position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.sparse import Grid


@dataclass(frozen=True)
class Relations:
    """Positions of the tokens of a batch, in the form in which attention needs them.

    ``sin`` and ``cos``: ``[B or 1, 1, T, head_dim]``, no rotation for prefix tokens.
    ``index``: int64 ``[B or 1, T, T]`` into a block's table of biases.  All None where the
    model has no such thing.
    """

    sin: Tensor | None = None
    cos: Tensor | None = None
    index: Tensor | None = None

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.sin is not None

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys ``[B, H, T, D]`` (arXiv 2104.09864, section 3.4).

        Feature ``i`` makes a pair with ``i + D / 2``.
        """
        if self.sin is None or self.cos is None:
            return x
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([-second, first], dim=-1) * self.sin).to(x.dtype)

    def bias(self, table: Tensor | None) -> Tensor | None:
        """Biases of the scores ``[B or 1, H, T, T]`` from a table ``[entries, H]``."""
        if table is None or self.index is None:
            return None
        return F.embedding(self.index, table).permute(0, 3, 1, 2)


def rotations(rope: Tensor, positions: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """(sin, cos) of tokens from the table ``[N, 2 * head_dim]`` of patches."""
    table = rope[None] if positions is None else F.embedding(positions, rope)
    sin, cos = F.pad(table, (0, 0, prefix, 0)).chunk(2, dim=-1)
    if prefix:
        cos = torch.cat([torch.ones_like(cos[:, :prefix]), cos[:, prefix:]], dim=1)
    return sin[:, None], cos[:, None]


def bias_entries(grid: Grid) -> int:
    """Length of a table of biases: one for each offset of two patches, three for the class
    token (from it, to it, to itself)."""
    return (2 * grid.rows - 1) * (2 * grid.columns - 1) + 3


def bias_index(grid: Grid, positions: Tensor | None, device: torch.device) -> Tensor:
    """Entry for each pair of tokens, int64 ``[B or 1, 1 + L, 1 + L]`` (arXiv 2106.08254).

    The first token is the class token.
    """
    if positions is None:
        positions = torch.arange(grid.patches, device=device)[None]
    row, column = positions // grid.columns, positions % grid.columns
    down = row[:, :, None] - row[:, None, :] + grid.rows - 1
    right = column[:, :, None] - column[:, None, :] + grid.columns - 1
    index = F.pad(down * (2 * grid.columns - 1) + right, (1, 0, 1, 0))
    entries = bias_entries(grid)
    index[:, 0, :] = entries - 3
    index[:, :, 0] = entries - 2
    index[:, 0, 0] = entries - 1
    return index
