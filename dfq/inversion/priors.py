"""Image priors that act on any subset of an image's patches."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.sparse import Grid, patchify, unpatchify

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Right, down, and the two diagonals, in pixels (down, right)."""


class TotalVariation:
    """Sum over four directions of the L2 norm of neighbouring pixels' differences.

    The prior of DeepInversion (arXiv 1912.08795, section 3.1), but per image, so that its
    strength does not depend on the batch, and only over pairs of which both pixels are
    in patches present, so that a missing neighbour is no border.
    """

    def __init__(self, positions: Tensor, grid: Grid) -> None:
        """``positions`` are the live patches, int64 ``[B, L]``."""
        self.positions, self.grid = positions, grid
        self.pairs = self._pairs(positions)

    def place(self, positions: Tensor) -> None:
        """Take other positions, as many as before, without moving a tensor that is read."""
        self.positions = positions
        for pairs, new in zip(self.pairs, self._pairs(positions), strict=True):
            pairs.copy_(new)

    def _pairs(self, positions: Tensor) -> list[Tensor]:
        grid = self.grid
        live = torch.ones(*positions.shape, 1, device=positions.device)
        mask_grid = Grid(grid.image_size, grid.patch_size, 1)
        live = live.expand(-1, -1, mask_grid.patch_values)
        mask = unpatchify(live, positions, mask_grid)
        views = (_neighbours(mask, direction) for direction in DIRECTIONS)
        return [first * second for first, second in views]

    def gradient(self, patches: Tensor) -> Tensor:
        """Gradient ``[B, L, D]`` of the sum over images, for patches ``[B, L, D]``."""
        canvas = unpatchify(patches, self.positions, self.grid)
        result = torch.zeros_like(canvas)
        for direction, pairs in zip(DIRECTIONS, self.pairs, strict=True):
            first, second = _neighbours(canvas, direction)
            difference = (first - second).mul_(pairs)
            norm = difference.flatten(1).norm(dim=1).clamp_min_(1e-8)
            difference.div_(norm[:, None, None, None])
            first_out, second_out = _neighbours(result, direction)
            first_out.add_(difference)
            second_out.sub_(difference)
        dense = patchify(result, self.grid)
        return dense.gather(1, self.positions[..., None].expand_as(patches))

    def value(self, patches: Tensor) -> Tensor:
        """The prior of each image, ``[B]``."""
        canvas = unpatchify(patches, self.positions, self.grid)
        norms = []
        for direction, pairs in zip(DIRECTIONS, self.pairs, strict=True):
            first, second = _neighbours(canvas, direction)
            norms.append(((first - second) * pairs).flatten(1).norm(dim=1))
        return torch.stack(norms).sum(0)


def _neighbours(image: Tensor, direction: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two views of ``[B, C, H, W]`` whose entries are neighbours in a direction."""
    down, right = direction
    height, width = image.shape[-2:]
    left = max(0, -right)
    right = max(0, right)
    return (
        image[..., : height - down, left : width - right],
        image[..., down:, right : width - left],
    )
