"""Rolls and flips of whole patches."""

from __future__ import annotations

import pytest
import torch

from dfq.inversion.jitter import draw, mirror, move_table
from dfq.sparse import Grid, patchify, unpatchify

GRID = Grid((12, 20), (3, 5), 3)


@pytest.mark.parametrize("flip", [False, True], ids=["unflipped", "flipped"])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-1, 2), (3, -3)])
def test_moved_patches_are_the_patches_of_the_moved_image(
    down: int, right: int, flip: bool
) -> None:
    image = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.roll(image, (down * 3, right * 5), dims=(2, 3))
    expected = expected.flip(-1) if flip else expected
    patches = patchify(image, GRID)
    patches = mirror(patches, GRID) if flip else patches
    positions = move_table(GRID, down, right, flip).expand(2, -1)
    assert torch.equal(unpatchify(patches, positions, GRID), expected)


def test_mirror_is_its_own_inverse() -> None:
    patches = torch.randn(2, 4, GRID.patch_values)
    assert torch.equal(mirror(mirror(patches, GRID), GRID), patches)


def test_draws_stay_within_the_share_of_the_side() -> None:
    grid = Grid((16, 32), (1, 1), 1)
    generator = torch.Generator().manual_seed(0)
    moves = [draw(grid, 0.125, True, generator) for _ in range(300)]
    assert {m[0] for m in moves} == set(range(-2, 3))
    assert {m[1] for m in moves} == set(range(-4, 5))
    assert {m[2] for m in moves} == {False, True}


def test_flips_can_be_turned_off() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not any(draw(GRID, 0.125, False, generator)[2] for _ in range(50))
