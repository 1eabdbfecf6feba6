"""Grids, patches and pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq.sparse import (
    Grid,
    SparseImages,
    channel_values,
    input_to_pixels,
    patchify,
    pixels_to_input,
    unpatchify,
)
from dfq.vit import Preprocessing

QUICK = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Rectangular patches, any number of channels, and pixels that fit in no patch."""
    ph, pw = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    spare_h, spare_w = draw(st.integers(0, ph - 1)), draw(st.integers(0, pw - 1))
    size = (rows * ph + spare_h, columns * pw + spare_w)
    return Grid(size, (ph, pw), draw(st.integers(1, 5)))


seeds = st.integers(0, 1000)


def random_images(grid: Grid, seed: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, grid.channels, *grid.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def some_positions(grid: Grid, seed: int, count: int) -> Tensor:
    """``count`` distinct positions in random order, as a batch of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(grid.patches, generator=generator)[:count] for _ in range(2)]
    )


def whole_patches(images: Tensor, grid: Grid) -> Tensor:
    ph, pw = grid.patch_size
    return images[:, :, : grid.rows * ph, : grid.columns * pw]


@QUICK
@given(grids(), seeds)
def test_unpatchify_restores_all_whole_patches(grid: Grid, seed: int) -> None:
    images = random_images(grid, seed)
    positions = torch.arange(grid.patches).expand(2, -1)
    restored = unpatchify(patchify(images, grid), positions, grid)
    assert torch.equal(restored, whole_patches(images, grid))


@QUICK
@given(grids(), seeds)
def test_patch_is_the_block_of_its_row_and_column(grid: Grid, seed: int) -> None:
    images = random_images(grid, seed)
    patches = patchify(images, grid)
    ph, pw = grid.patch_size
    assert patches.shape == (2, grid.patches, grid.patch_values)
    for i in range(grid.patches):
        y, x = i // grid.columns * ph, i % grid.columns * pw
        block = images[:, :, y : y + ph, x : x + pw]
        assert torch.equal(patches[:, i], block.flatten(1))


def test_patch_values_are_in_channel_row_column_order() -> None:
    grid = Grid((2, 3), (2, 3), 2)
    image = torch.arange(12).reshape(1, 2, 2, 3)
    assert patchify(image, grid).flatten().tolist() == list(range(12))


@QUICK
@given(grids(), seeds)
def test_patchify_cuts_as_a_strided_convolution_does(grid: Grid, seed: int) -> None:
    images = random_images(grid, seed).float()
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randint(-3, 4, (3, grid.channels, *grid.patch_size), generator=generator)
    convolved = torch.nn.functional.conv2d(images, kernel.float(), stride=grid.patch_size)
    product = patchify(images, grid) @ kernel.float().flatten(1).T
    assert torch.equal(product, convolved.flatten(2).transpose(1, 2))


@QUICK
@given(grids(), seeds, st.data())
def test_subset_of_patches_is_laid_at_its_positions(
    grid: Grid, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, grid.patches))
    positions = some_positions(grid, seed, count)
    dense = patchify(random_images(grid, seed), grid)
    patches = dense.gather(1, positions[..., None].expand(-1, -1, grid.patch_values))
    laid = patchify(unpatchify(patches, positions, grid, fill=77), grid)
    for b in range(2):
        present = positions[b].tolist()
        for i in range(grid.patches):
            if i in present:
                assert torch.equal(laid[b, i], dense[b, i])
            else:
                assert bool((laid[b, i] == 77).all())


def test_absent_patches_are_zero_by_default() -> None:
    grid = Grid((2, 4), (2, 2), 1)
    image = unpatchify(torch.full((1, 1, 4), 9.0), torch.tensor([[1]]), grid)
    assert image.tolist() == [[[[0, 0, 9, 9], [0, 0, 9, 9]]]]


def test_grid_leaves_out_incomplete_patches() -> None:
    grid = Grid((17, 11), (4, 5), 3)
    assert (grid.rows, grid.columns, grid.patches, grid.patch_values) == (4, 2, 8, 60)


def test_channel_values_follow_the_patch_layout() -> None:
    grid = Grid((2, 2), (1, 2), 3)
    assert channel_values((1.0, 2.0, 3.0), grid).tolist() == [1, 1, 2, 2, 3, 3]


@QUICK
@given(
    st.lists(
        st.tuples(st.floats(-1.0, 2.0, width=32), st.floats(2**-7, 4.0, width=32)),
        min_size=1,
        max_size=4,
    )
)
def test_every_pixel_value_survives_normalization(channels: list[tuple[float, float]]) -> None:
    by = Preprocessing(tuple(m for m, _ in channels), tuple(s for _, s in channels))
    grid = Grid((16, 16), (16, 16), len(channels))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(1, len(channels))
    assert torch.equal(input_to_pixels(pixels_to_input(pixels, by, grid), by, grid), pixels)


def test_normalization_is_per_channel() -> None:
    grid = Grid((1, 1), (1, 1), 2)
    pixels = torch.tensor([[51, 255]], dtype=torch.uint8)
    actual = pixels_to_input(pixels, Preprocessing((0.1, 0.5), (0.2, 0.25)), grid)
    torch.testing.assert_close(actual, torch.tensor([[0.5, 2.0]]))


@pytest.mark.parametrize(
    ("level", "pixel"), [(-3.0, 0), (-0.4, 0), (0.6, 1), (127.4, 127), (254.6, 255), (300.0, 255)]
)
def test_input_becomes_the_nearest_pixel(level: float, pixel: int) -> None:
    grid = Grid((1, 1), (1, 1), 1)
    patch = torch.tensor([[(level / 255 - 0.5) / 0.25]])
    assert input_to_pixels(patch, Preprocessing((0.5,), (0.25,)), grid).tolist() == [[pixel]]


def test_conversion_leaves_its_input_as_it_is() -> None:
    grid = Grid((1, 1), (1, 1), 1)
    patch = torch.tensor([[0.123]])
    input_to_pixels(patch, Preprocessing((0.0,), (1.0,)), grid)
    assert patch.item() == pytest.approx(0.123)


@pytest.fixture
def batch() -> SparseImages:
    """Four images of two patches whose every field tells them apart."""
    n = torch.arange(4)
    return SparseImages(
        patches=n.to(torch.uint8)[:, None, None].expand(4, 2, 3),
        positions=torch.stack([n, n + 4], dim=1),
        labels=n + 10,
        stage=n + 20,
        trajectory=n + 30,
    )


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([3, 0])])
def test_indexing_keeps_the_fields_of_an_image_together(
    batch: SparseImages, index: slice | Tensor
) -> None:
    chosen = torch.arange(4)[index]
    part = batch[index]
    assert len(part) == 2
    assert part.patches[:, 0, 0].tolist() == chosen.tolist()
    assert part.positions[:, 1].tolist() == (chosen + 4).tolist()
    assert part.labels.tolist() == (chosen + 10).tolist()
    assert part.stage.tolist() == (chosen + 20).tolist()
    assert part.trajectory.tolist() == (chosen + 30).tolist()


def test_to_moves_every_field(batch: SparseImages) -> None:
    moved = batch.to("meta")
    fields = (moved.patches, moved.positions, moved.labels, moved.stage, moved.trajectory)
    assert {t.device.type for t in fields} == {"meta"}
