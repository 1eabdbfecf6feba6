"""The live patches of a unit of work, and Adam's moments."""

from __future__ import annotations

import torch
from torch import Tensor


class State:
    """The live patches of a unit with Adam's moments, all ``[B, L, D]`` float32."""

    def __init__(self, patches: Tensor, positions: Tensor) -> None:
        """Create a state before the first step; ``positions`` is int64 ``[B, L]``."""
        self.patches, self.positions = patches, positions
        self.first, self.second = torch.zeros_like(patches), torch.zeros_like(patches)
        self.step = 0

    @property
    def width(self) -> int:
        """Number of values of a patch."""
        return self.patches.shape[2]

    def copy_(self, other: State) -> None:
        """Copy the values of a state of the same shape."""
        for name in ("patches", "positions", "first", "second"):
            getattr(self, name).copy_(getattr(other, name))
        self.step = other.step

    def remove(self, leaving: Tensor) -> None:
        """Drop patches by index ``[B, count]``; the others keep their order."""
        batch, live = self.positions.shape
        stays = torch.ones(batch, live, dtype=torch.bool, device=leaving.device)
        stays.scatter_(1, leaving, False)
        rest = live - leaving.shape[1]
        self.positions = self.positions[stays].reshape(batch, rest)
        for name in ("patches", "first", "second"):
            setattr(self, name, getattr(self, name)[stays].reshape(batch, rest, self.width))
