"""Random images to measure and compare runtimes with."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.sparse import images_to_input
from dfq.vit import Architecture, Preprocessing


def random_images(
    arch: Architecture, preprocessing: Preprocessing, count: int, seed: int = 0
) -> Tensor:
    """Return normalized random pixels, float32 ``[count, C, H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, arch.in_channels, *arch.image_size)
    return images_to_input(torch.randint(0, 256, shape, generator=generator), preprocessing)
