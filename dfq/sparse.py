"""Sparse images: a subset of an image's patches, with their positions.

Letters used for shapes throughout dfq: ``B`` images, ``N`` patches of the full grid,
``L`` or ``K`` patches that are present, ``C`` channels, ``P`` patch side (height and
width may differ), ``D = C*P*P`` values of a patch.  Position ``i`` is row ``i // columns``,
column ``i % columns`` of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Grid of patches of an image.

    ``image_size`` and ``patch_size`` are (height, width) in pixels.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int

    @property
    def rows(self) -> int:
        return self.image_size[0] // self.patch_size[0]

    @property
    def columns(self) -> int:
        return self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Number of patches ``N``."""
        return self.rows * self.columns

    @property
    def patch_values(self) -> int:
        """Number of values of a patch, ``D``."""
        return self.channels * self.patch_size[0] * self.patch_size[1]


@dataclass(frozen=True)
class SparseImages:
    """Batch of images of which only some patches are present.

    Attributes:
        patches: uint8 ``[B, K, D]``, levels of the input range (pixel values 0..255 for pixels),
            each patch in (C, P, P) order.
        positions: int64 ``[B, K]``, distinct within an image, in ``[0, N)``.
        labels: int64 ``[B]``, the class each image was made for; -1 without a class.
        stage: int64 ``[B]``, the stage of the trajectory at which each image was extracted, from 0.
        trajectory: int64 ``[B]``, index of the optimization trajectory of each image.
    """

    patches: Tensor
    positions: Tensor
    labels: Tensor
    stage: Tensor
    trajectory: Tensor

    def __len__(self) -> int:
        return self.patches.shape[0]

    def __getitem__(self, index: slice | Tensor) -> SparseImages:
        return SparseImages(
            self.patches[index],
            self.positions[index],
            self.labels[index],
            self.stage[index],
            self.trajectory[index],
        )

    def to(self, device: torch.device | str) -> SparseImages:
        """The same images on another device."""
        return SparseImages(
            self.patches.to(device),
            self.positions.to(device),
            self.labels.to(device),
            self.stage.to(device),
            self.trajectory.to(device),
        )


def join(batches: Sequence[SparseImages]) -> SparseImages:
    """Concatenate batches whose images have equal numbers of patches."""
    names = [f.name for f in fields(SparseImages)]
    return SparseImages(*(torch.cat([getattr(b, name) for b in batches]) for name in names))


def patchify(images: Tensor, grid: Grid) -> Tensor:
    """Cut images ``[B, C, H, W]`` into patches ``[B, N, D]``, row by row.

    Pixels beyond the last complete patch are dropped, as by a strided convolution.
    """
    (ph, pw), c = grid.patch_size, grid.channels
    images = images[:, :, : grid.rows * ph, : grid.columns * pw]
    x = images.reshape(images.shape[0], c, grid.rows, ph, grid.columns, pw)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], grid.patches, grid.patch_values)


def unpatchify(patches: Tensor, positions: Tensor, grid: Grid, fill: float = 0) -> Tensor:
    """Place patches ``[B, L, D]`` at ``positions`` ``[B, L]`` in images ``[B, C, H, W]``.

    Pixels of missing patches are ``fill``.
    """
    (ph, pw), c, b = grid.patch_size, grid.channels, patches.shape[0]
    canvas = patches.new_full((b * grid.patches, grid.patch_values), fill)
    canvas.index_copy_(0, _rows(positions, grid), patches.flatten(0, 1))
    x = canvas.reshape(b, grid.rows, grid.columns, c, ph, pw)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, grid.rows * ph, grid.columns * pw)


def select_patches(patches: Tensor, positions: Tensor, grid: Grid) -> Tensor:
    """Select the patches at ``positions`` ``[B, L]`` of those of whole images ``[B, N, D]``."""
    rows = patches.flatten(0, 1).index_select(0, _rows(positions, grid))
    return rows.view(*positions.shape, -1)


def _rows(positions: Tensor, grid: Grid) -> Tensor:
    """Index the patches of a whole batch, int64 ``[B * L]``."""
    first = torch.arange(len(positions), device=positions.device)[:, None] * grid.patches
    return (positions + first).flatten()


def channel_values(
    values: tuple[float, ...], grid: Grid, device: torch.device | str = "cpu"
) -> Tensor:
    """Repeat one value per channel for all values of a patch: float32 ``[D]``."""
    height, width = grid.patch_size
    by_channel = torch.tensor(values, dtype=torch.float32, device=device)
    return by_channel.repeat_interleave(height * width)


class Normalization(Protocol):
    """Normalization of levels: ``(level / 255 - level_mean) / level_std``."""

    @property
    def level_mean(self) -> tuple[float, ...]: ...

    @property
    def level_std(self) -> tuple[float, ...]: ...


def pixels_to_input(pixels: Tensor, normalization: Normalization, grid: Grid) -> Tensor:
    """Normalize patches of levels, uint8 ``[..., D]``, to the network's float32 input."""
    mean = channel_values(normalization.level_mean, grid).to(pixels.device)
    std = channel_values(normalization.level_std, grid).to(pixels.device)
    return (pixels.float() / 255 - mean) / std


def input_to_pixels(patches: Tensor, normalization: Normalization, grid: Grid) -> Tensor:
    """Convert normalized patches ``[..., D]`` to uint8 levels, rounded and clamped to 0..255."""
    mean = channel_values(normalization.level_mean, grid).to(patches.device)
    std = channel_values(normalization.level_std, grid).to(patches.device)
    return ((patches.float() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def images_to_input(images: Tensor, normalization: Normalization) -> Tensor:
    """Normalize images of levels ``[..., C, H, W]`` to the network's float32 input."""
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (normalization.level_mean, normalization.level_std)
    )
    return (images.float() / 255 - mean.to(images.device)) / std.to(images.device)
