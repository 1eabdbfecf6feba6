"""Total variation on subsets of patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.inversion.losses.total_variation import TotalVariation
from dfq.sparse import Grid, unpatchify

GRID = Grid((12, 18), (3, 6), 2)


def sample(live: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(live)
    positions = torch.stack(
        [torch.randperm(GRID.patches, generator=generator)[:live].sort().values] * batch
    )
    return torch.randn(batch, live, GRID.patch_values, generator=generator), positions


@pytest.mark.parametrize("live", [1, 5, 12])
def test_gradient_is_that_of_the_value(live: int) -> None:
    patches, positions = sample(live)
    prior = TotalVariation().bind(positions, GRID)
    leaf = patches.clone().double().requires_grad_()
    prior.pairs = [p.double() for p in prior.pairs]
    (expected,) = torch.autograd.grad(prior.value(leaf).sum(), leaf)
    actual = TotalVariation().bind(positions, GRID).gradient(patches)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)


def test_value_on_all_patches_is_the_dense_formula() -> None:
    patches, positions = sample(GRID.patches)
    x = unpatchify(patches, positions, GRID)
    expected = (
        (x[..., 1:] - x[..., :-1]).flatten(1).norm(dim=1)
        + (x[..., 1:, :] - x[..., :-1, :]).flatten(1).norm(dim=1)
        + (x[..., 1:, 1:] - x[..., :-1, :-1]).flatten(1).norm(dim=1)
        + (x[..., 1:, :-1] - x[..., :-1, 1:]).flatten(1).norm(dim=1)
    )
    actual = TotalVariation().bind(positions, GRID).value(patches)
    torch.testing.assert_close(actual, expected)


def test_an_image_does_not_depend_on_its_batch() -> None:
    patches, positions = sample(7)
    together = TotalVariation().bind(positions, GRID).gradient(patches)
    alone = TotalVariation().bind(positions[1:2], GRID).gradient(patches[1:2])
    torch.testing.assert_close(together[1:2], alone)


def test_constant_patches_with_missing_neighbors_have_no_variation() -> None:
    _, positions = sample(5)
    patches = torch.full((3, 5, GRID.patch_values), 0.7)
    prior = TotalVariation().bind(positions, GRID)
    assert prior.value(patches).abs().max() == 0
    assert prior.gradient(patches).abs().max() == 0
