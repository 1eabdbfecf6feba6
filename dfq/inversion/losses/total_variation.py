"""Total variation over the pairs of pixels that are both present."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from dfq.inversion.losses.loss import ImageLoss
from dfq.validation import settings

if TYPE_CHECKING:
    from torch import Tensor

    from dfq.sparse import Grid

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Right, down and the two diagonals, as (down, right) in pixels."""


@settings
class TotalVariation(ImageLoss):
    """Sum over four directions of the L2 norm of neighboring pixels' differences.

    The prior of DeepInversion (arXiv 1912.08795, section 3.1), but per image, so that its
    strength does not depend on the batch, and only over pairs of which both pixels are
    in patches present, so that a missing neighbor is no border.
    """

    name: ClassVar[str] = "total-variation"
    weight_field: ClassVar[str] = "tv"

    tv: float = Field(
        default=5.7e-4, ge=0.0, le=1e6, description="weight of each image's total variation"
    )

    def bind(self, positions: Tensor, grid: Grid) -> BoundTotalVariation:
        return BoundTotalVariation(positions, grid)


class BoundTotalVariation:
    """Total variation of images with patches at ``positions``."""

    def __init__(self, positions: Tensor, grid: Grid) -> None:
        """``positions`` are the live patches, int64 ``[B, L]``."""
        self.positions, self.grid = positions, grid
        self.pairs = self._pairs(positions)

    def set_positions(self, positions: Tensor) -> None:
        """Replace the positions in place, so that captured CUDA graphs read the new ones."""
        self.positions = positions
        for pairs, new in zip(self.pairs, self._pairs(positions), strict=True):
            pairs.copy_(new)

    def _pairs(self, positions: Tensor) -> list[Tensor]:
        from dfq.sparse import Grid, unpatchify

        mask_grid = Grid(self.grid.image_size, self.grid.patch_size, 1)
        live = positions.new_ones(*positions.shape, 1).float()
        mask = unpatchify(live.expand(-1, -1, mask_grid.patch_values), positions, mask_grid)
        views = (_neighbors(mask, direction) for direction in DIRECTIONS)
        return [first * second for first, second in views]

    def gradient(self, patches: Tensor) -> Tensor:
        """Return the gradient ``[B, L, D]`` of the sum over images, for patches ``[B, L, D]``."""
        from dfq.sparse import patchify, select_patches, unpatchify

        canvas = unpatchify(patches, self.positions, self.grid)
        result = canvas.new_zeros(canvas.shape)
        for direction, pairs in zip(DIRECTIONS, self.pairs, strict=True):
            first, second = _neighbors(canvas, direction)
            difference = (first - second).mul_(pairs)
            norm = difference.flatten(1).norm(dim=1).clamp_min_(1e-8)
            difference.div_(norm[:, None, None, None])
            first_out, second_out = _neighbors(result, direction)
            first_out.add_(difference)
            second_out.sub_(difference)
        return select_patches(patchify(result, self.grid), self.positions, self.grid)

    def value(self, patches: Tensor) -> Tensor:
        """Return the loss of each image, ``[B]``."""
        from dfq.sparse import unpatchify

        canvas = unpatchify(patches, self.positions, self.grid)
        total = canvas.new_zeros(len(canvas))
        for direction, pairs in zip(DIRECTIONS, self.pairs, strict=True):
            first, second = _neighbors(canvas, direction)
            total = total + ((first - second) * pairs).flatten(1).norm(dim=1)
        return total


def _neighbors(image: Tensor, direction: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return two views of ``[B, C, H, W]`` whose entries are neighbors in a direction."""
    down, right = direction
    height, width = image.shape[-2:]
    left = max(0, -right)
    right = max(0, right)
    return (
        image[..., : height - down, left : width - right],
        image[..., down:, right : width - left],
    )
