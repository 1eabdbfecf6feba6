"""Position encodings within attention: rotary embeddings and relative position biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.sparse import Grid


@dataclass(frozen=True)
class PositionEncoding:
    """Position encoding of the tokens of a batch, as attention applies it.

    ``sin`` and ``cos``: rotary embedding, ``[B or 1, 1, T, head_dim]``; prefix tokens are not
    rotated.  ``bias_index``: int64 ``[B or 1, T, T]``, indices into a block's table of relative
    position biases.  None where the model does not use them.
    """

    sin: Tensor | None = None
    cos: Tensor | None = None
    bias_index: Tensor | None = None

    @property
    def has_rope(self) -> bool:
        """Whether queries and keys get a rotary embedding."""
        return self.sin is not None

    def apply_rope(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to queries or keys ``[B, H, T, D]``.

        RoFormer, arXiv 2104.09864, section 3.4; feature ``i`` is paired with ``i + D / 2``.
        """
        if self.sin is None or self.cos is None:
            return x
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([-second, first], dim=-1) * self.sin).to(x.dtype)

    def bias(self, table: Tensor | None) -> Tensor | None:
        """Look up the biases of the scores, ``[B or 1, H, T, T]``, in a table ``[entries, H]``."""
        if table is None or self.bias_index is None:
            return None
        return F.embedding(self.bias_index, table).permute(0, 3, 1, 2)


def rope_sin_cos(rope: Tensor, positions: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """Return sin and cos of all tokens from the table ``[N, 2 * head_dim]`` of patches."""
    table = rope[None] if positions is None else F.embedding(positions, rope)
    sin, cos = F.pad(table, (0, 0, prefix, 0)).chunk(2, dim=-1)
    if prefix:
        cos = torch.cat([torch.ones_like(cos[:, :prefix]), cos[:, prefix:]], dim=1)
    return sin[:, None], cos[:, None]


def relative_bias_length(grid: Grid) -> int:
    """Return the length of a bias table: one entry per offset of two patches, and three for the
    class token (from it, to it, to itself)."""
    return (2 * grid.rows - 1) * (2 * grid.columns - 1) + 3


def relative_position_index(grid: Grid, positions: Tensor | None, device: torch.device) -> Tensor:
    """Return the table index of each pair of tokens, int64 ``[B or 1, 1 + L, 1 + L]``.

    The first token is the class token (BEiT, arXiv 2106.08254).
    """
    if positions is None:
        positions = torch.arange(grid.patches, device=device)[None]
    row, column = positions // grid.columns, positions % grid.columns
    down = row[:, :, None] - row[:, None, :] + grid.rows - 1
    right = column[:, :, None] - column[:, None, :] + grid.columns - 1
    index = F.pad(down * (2 * grid.columns - 1) + right, (1, 0, 1, 0))
    entries = relative_bias_length(grid)
    index[:, 0, :] = entries - 3
    index[:, :, 0] = entries - 2
    index[:, 0, 0] = entries - 1
    return index
