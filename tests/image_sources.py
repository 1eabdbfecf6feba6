"""Images in arrays and folders, and a model's view of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from conftest import make_vit
from PIL import Image

from dfq.data.images import ArrayImages, FolderImages, open_images
from dfq.vit import Architecture, Preprocessing
from dfq.vit.convert import describe

ARCH = describe(make_vit(), "tiny")


GRAY = dataclasses.replace(ARCH, in_channels=1)


PREPROCESSING = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.875)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, *shape: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*shape, seed=seed)).save(path)


def folder(root: Path, classes: list[str], each: int = 2) -> Path:
    for c, name in enumerate(classes):
        for i in range(each):
            save_image(root / name / f"{i}.png", 20, 24, 3, seed=10 * c + i)
    return root


def opened(
    path: str | Path, arch: Architecture = ARCH, labeled: bool = True
) -> ArrayImages | FolderImages:
    source = open_images(path, arch, PREPROCESSING, labeled=labeled)
    assert isinstance(source, ArrayImages | FolderImages)
    return source
