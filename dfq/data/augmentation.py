"""Augmentation of inverted images for calibration, made without data.

Inverted images have much fine texture and few smooth areas, so calibration on them alone misses
directions of a layer's input that photographs use.  Augmentation adds noise with the spectrum of
natural images, and low-resolution copies of both kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.arguments import checked
from dfq.data.dataset import SparseImageDataset
from dfq.sparse import Grid, SparseImages, join, patchify, select_patches, unpatchify

SPREAD = 64.0
"""Standard deviation of fractal noise, in pixel levels."""

MIDDLE = 127.5


class AugmentationSettings(Protocol):
    """Augmentation settings.

    ``smooth``: divisors of the resolution of low-resolution copies.  ``fractal``: number of images
    of fractal noise.
    """

    @property
    def smooth(self) -> tuple[float, ...]: ...

    @property
    def fractal(self) -> int: ...


class AugmentedImages:
    """Inverted dataset with its augmentation, as batches of sparse images."""

    def __init__(self, dataset: SparseImageDataset, settings: AugmentationSettings) -> None:
        self.dataset, self.settings = dataset, settings

    def __len__(self) -> int:
        trajectories = sum(len(_trajectories(unit)) for unit in self.dataset.units())
        smooth, fractal = len(self.settings.smooth), self.settings.fractal
        return len(self.dataset) + fractal + (trajectories + fractal) * smooth

    def batches(self, size: int) -> Iterator[SparseImages]:
        """Yield batches of at most ``size`` images with equal numbers of patches."""
        yield from self.dataset.batches(size)
        for images in self._whole(size):
            for factor in self.settings.smooth:
                yield from _cut(smoothed(images, self.dataset.grid, factor), size)
        yield from self._fractal(size)

    def _whole(self, size: int) -> Iterator[SparseImages]:
        """Yield the images that are smoothed: recomposed trajectories and fractal noise."""
        for unit in self.dataset.units():
            yield from recompose(unit)
        yield from self._fractal(size)

    def _fractal(self, size: int) -> Iterator[SparseImages]:
        for first in range(0, self.settings.fractal, size):
            count = min(size, self.settings.fractal - first)
            yield fractal_noise(count, self.dataset.grid, first)


def recompose(unit: list[SparseImages]) -> list[SparseImages]:
    """Merge the images of each trajectory into one, grouped by number of patches.

    ``unit`` holds all images of some trajectories.  Where patches overlap, the latest stage wins.
    Labels are kept; ``stage`` becomes 0.
    """
    whole: dict[int, list[SparseImages]] = {}
    for trajectory in _trajectories(unit):
        parts = [batch[batch.trajectory == trajectory] for batch in unit]
        positions = torch.cat([p.positions.flatten() for p in parts])
        patches = torch.cat([p.patches.flatten(0, 1) for p in parts])
        stage = torch.cat([p.stage[:, None].expand_as(p.positions).flatten() for p in parts])
        in_turn = stage.argsort(stable=True)
        latest = dict(zip(positions[in_turn].tolist(), in_turn.tolist(), strict=True))
        order = torch.tensor([latest[position] for position in sorted(latest)])
        image = SparseImages(
            patches=patches[order][None],
            positions=positions[order][None],
            labels=next(p.labels[:1] for p in parts if len(p)),
            stage=torch.zeros(1, dtype=torch.int64),
            trajectory=torch.tensor([trajectory]),
        )
        whole.setdefault(len(order), []).append(image)
    return [join(images) for images in whole.values()]


def smoothed(images: SparseImages, grid: Grid, factor: float) -> SparseImages:
    """Resample images to 1 / ``factor`` of their resolution and back.

    Pixels of missing patches are ignored.
    """
    present = torch.ones_like(images.patches, dtype=torch.float32)
    pixels = unpatchify(images.patches.float(), images.positions, grid)
    weight = unpatchify(present, images.positions, grid)
    size = [max(1, round(side / factor)) for side in pixels.shape[-2:]]
    blurred = _resample(pixels, size) / _resample(weight, size).clamp_min(0.05)
    dense = patchify(blurred.round_().clamp_(0, 255), grid).to(torch.uint8)
    patches = select_patches(dense, images.positions, grid)
    return dataclasses.replace(images, patches=patches)


def _resample(pixels: Tensor, size: list[int]) -> Tensor:
    small = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=pixels.shape[-2:], mode="bicubic")


@checked
def fractal_noise(count: int, grid: Grid, first: int = 0) -> SparseImages:
    """Make ``count`` complete images of noise with amplitude 1 / frequency, as in natural images.

    Image ``i``, which has trajectory ``i``, is always the same; ``first`` is the first index.
    D. J. Field, J. Opt. Soc. Am. A 4, 2379 (1987).
    """
    height, width = (n * p for n, p in zip((grid.rows, grid.columns), grid.patch_size, strict=True))
    white = torch.stack(
        [
            torch.randn(
                grid.channels, height, width, generator=torch.Generator().manual_seed(index)
            )
            for index in range(first, first + count)
        ]
    )
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (down.square() + right.square()).sqrt().clamp_min(1 / max(height, width))
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    noise = noise - noise.mean((2, 3), keepdim=True)
    noise = noise / noise.std((2, 3), keepdim=True, correction=0).clamp_min(1e-6)
    pixels = (noise * SPREAD + MIDDLE).round_().clamp_(0, 255)
    return SparseImages(
        patches=patchify(pixels, grid).to(torch.uint8),
        positions=torch.arange(grid.patches).expand(count, -1).contiguous(),
        labels=torch.full((count,), -1),
        stage=torch.zeros(count, dtype=torch.int64),
        trajectory=torch.arange(first, first + count),
    )


def stretched(images: SparseImages) -> SparseImages:
    """Stretch the contrast of each image so that its values range from 0 to 255."""
    values = images.patches.float()
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    pixels = ((values - low) / (high - low).clamp_min(1) * 255).round_()
    return dataclasses.replace(images, patches=pixels.to(torch.uint8))


def _trajectories(unit: list[SparseImages]) -> list[int]:
    return sorted({int(t) for batch in unit for t in batch.trajectory})


def _cut(images: SparseImages, size: int) -> Iterator[SparseImages]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
