"""Augmentation of inverted images for calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.data.augmentation import AugmentedImages, fractal_noise, recompose, smoothed
from dfq.data.dataset import SparseImageDataset
from dfq.recipe import QuantizationSettings
from dfq.sparse import Grid, SparseImages, unpatchify

FAST = {"iterations": 4, "precision": "float32", "threads": 1, "unit_size": 2}
GRID = Grid((24, 32), (4, 4), 3)


def dataset(model: VisionTransformer, path: Path, method: str, images: int) -> SparseImageDataset:
    dfq.invert(model, method=method, images=images, settings=FAST, out=path)
    return SparseImageDataset(path)


def total(batches: list[SparseImages]) -> int:
    return sum(map(len, batches))


def test_a_trajectory_is_laid_together_again(tmp_path: Path, tiny: VisionTransformer) -> None:
    images = dataset(tiny, tmp_path / "images", "pri", 16)
    units = list(images.units())
    assert [sorted(set(u[0].trajectory.tolist())) for u in units] == [[0, 1], [2, 3]]
    (whole,) = recompose(units[1])
    assert whole.positions.tolist() == [list(range(16))] * 2
    assert whole.trajectory.tolist() == [2, 3]
    for batch in units[1]:
        for patches, positions, trajectory in zip(
            batch.patches, batch.positions, batch.trajectory, strict=True
        ):
            assert torch.equal(whole.patches[int(trajectory) - 2, positions], patches)


def test_of_snapshots_the_last_is_taken(tmp_path: Path, tiny: VisionTransformer) -> None:
    settings = {**FAST, "snapshots": 3}
    dfq.invert(tiny, method="dmi", images=6, settings=settings, out=tmp_path / "images")
    (unit,) = SparseImageDataset(tmp_path / "images").units()
    (whole,) = recompose(unit)
    (images,) = unit
    assert torch.equal(whole.patches, images.patches[images.stage == 2])
    assert whole.positions.tolist() == [list(range(16))] * 2


def test_an_unfinished_trajectory_keeps_the_patches_that_it_has(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    images = dataset(tiny, tmp_path / "images", "pri", 7)
    whole = [group for unit in images.units() for group in recompose(unit)]
    assert sorted(group.positions.shape[1] for group in whole) == [12, 16]


@pytest.mark.parametrize("method", ["pri", "smi", "dmi"])
def test_all_that_is_announced_comes(tmp_path: Path, tiny: VisionTransformer, method: str) -> None:
    settings = QuantizationSettings(smooth=(2.0, 8.0), fractal=5)
    images = dataset(tiny, tmp_path / "images", method, 8)
    augmented = AugmentedImages(images, settings)
    trajectories = 2 if method == "pri" else 8
    assert len(augmented) == total(list(augmented.batches(3))) == 8 + 5 + 2 * (trajectories + 5)
    assert max(map(len, augmented.batches(3))) == 3


def test_without_additions_the_dataset_comes_alone(tmp_path: Path, tiny: VisionTransformer) -> None:
    images = dataset(tiny, tmp_path / "images", "pri", 8)
    augmented = AugmentedImages(images, QuantizationSettings(smooth=(), fractal=0))
    assert total(list(augmented.batches(4))) == len(augmented) == 8


def some(positions: torch.Tensor) -> SparseImages:
    n, live = positions.shape
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (n, live, 48), generator=generator, dtype=torch.uint8)
    zeros = torch.zeros(n, dtype=torch.int64)
    return SparseImages(patches, positions, zeros, zeros, torch.arange(n))


def roughness(images: SparseImages) -> float:
    pixels = unpatchify(images.patches.float(), images.positions, GRID)
    return float((pixels[..., 1:] - pixels[..., :-1]).square().mean())


def test_lower_resolutions_are_smoother() -> None:
    images = some(torch.arange(48).expand(2, -1))
    levels = [roughness(images), *(roughness(smoothed(images, GRID, f)) for f in (2, 4, 8))]
    assert levels == sorted(levels, reverse=True)
    assert levels[1] < 0.3 * levels[0]


def test_an_even_image_stays_even_whatever_is_missing() -> None:
    images = some(torch.tensor([[0, 1, 5, 20, 47], [3, 9, 10, 11, 40]]))
    even = dataclasses.replace(images, patches=torch.full_like(images.patches, 200))
    assert smoothed(even, GRID, 8.0).patches.unique().tolist() == [200]


def test_smoothing_leaves_what_is_present_where_it_is() -> None:
    positions = torch.tensor([[0, 1, 5, 20, 47]])
    images = smoothed(some(positions), GRID, 4.0)
    assert torch.equal(images.positions, positions)
    assert images.patches.shape == (1, 5, 48)


def test_fractal_noise_falls_with_frequency() -> None:
    grid = Grid((64, 64), (8, 8), 1)
    images = fractal_noise(8, grid)
    pixels = unpatchify(images.patches.float(), images.positions, grid)
    power = torch.fft.rfft2(pixels - pixels.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    low, high = power[0, 2:4].mean(), power[0, 16:24].mean()
    assert 20 < float(low / high) < 200
    assert 40 < float(pixels.std()) < 70
    assert torch.equal(fractal_noise(3, grid, 5).patches, images.patches[5:])
