"""The user's images, for evaluation (with labels or without) and for calibration."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfq import demo
from dfq.argument_names import option
from dfq.data.image_files import (
    EXTENSIONS,
    class_folders,
    image_files,
    map_classes,
    number_classes,
    read_class_map,
)
from dfq.data.image_modes import to_eight_bits
from dfq.data.value_images import check_pixels, check_values, to_levels
from dfq.errors import DataError
from dfq.failures import explained
from dfq.sparse import SparseImages, images_to_input, patchify
from dfq.vit import Architecture, Preprocessing
from dfq.vit.logits import label_count

MOST_PIXELS = 1 << 26
"""Largest number of pixels of an image between resizing and cropping."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow mode by number of input channels."""


@runtime_checkable
class ImageSource(Protocol):
    """Source of images that are read one at a time."""

    @property
    def name(self) -> str:
        """Name of the data."""

    @property
    def class_order(self) -> str | None:
        """Origin of the class indices; None without labels.

        ``y`` for arrays; for folders, one of :class:`dfq.data.image_files.ClassNumbers`.
        """

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> np.ndarray:
        """Read an image: uint8 ``[H, W, C]`` at the model's size."""

    def label(self, index: int) -> int:
        """Return the class index of an image; -1 without labels."""


@dataclass(frozen=True)
class ArrayImages:
    """Images of an ``.npz``: ``x`` ``[N, H, W, C]`` or ``[N, H, W]``, ``y`` ``[N]``.

    ``x`` holds uint8 pixels, which are resized without cropping, or floating-point values in the
    model's input range, at its size.
    """

    name: str
    x: np.ndarray
    y: np.ndarray | None
    arch: Architecture
    preprocessing: Preprocessing

    @property
    def class_order(self) -> str | None:
        return None if self.y is None else "y"

    def __len__(self) -> int:
        return len(self.x)

    def label(self, index: int) -> int:
        return -1 if self.y is None else int(self.y[index])

    def pixels(self, index: int) -> np.ndarray:
        array = self.x[index]
        if array.dtype != np.uint8:
            return to_levels(array, self.preprocessing)
        image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        return fit(image, self.arch, self.preprocessing, crop=False)


@dataclass(frozen=True)
class FolderImages:
    """Image files, resized and center-cropped according to the model's data config."""

    name: str
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    arch: Architecture
    preprocessing: Preprocessing
    class_order: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return -1 if self.labels is None else self.labels[index]

    def pixels(self, index: int) -> np.ndarray:
        path = self.files[index]
        with (
            explained(lambda e: DataError(f"{str(path)!r} cannot be read as an image: {e}.")),
            Image.open(path) as image,
        ):
            return fit(image, self.arch, self.preprocessing, crop=True)


def fit(
    image: Image.Image, arch: Architecture, preprocessing: Preprocessing, *, crop: bool
) -> np.ndarray:
    """Resize and, with ``crop``, center-crop an image to the model's input, uint8 ``[H, W, C]``.

    As in timm, the shorter side is first resized to ``side / crop_pct``; both sides if the crop
    mode is ``squash``.

    Raises:
        ValueError: the image does not define black and white, or is too thin to crop.
    """
    image = to_eight_bits(image, MODES[arch.in_channels])
    height, width = arch.image_size
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    if not crop:
        size = (width, height)
        image = image if image.size == size else image.resize(size, resample)
    else:
        size = _resized(image.size, (width, height), preprocessing)
        if size[0] * size[1] > MOST_PIXELS:
            raise ValueError(
                f"{image.size[0]} x {image.size[1]} pixels are too thin to be resized and cropped"
            )
        image = image.resize(size, resample)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _resized(
    size: tuple[int, int], target: tuple[int, int], preprocessing: Preprocessing
) -> tuple[int, int]:
    """Return the size before the center crop, (width, height), rounded as in timm's transforms."""
    w, h = size
    width, height = (math.floor(side / preprocessing.crop_pct) for side in target)
    if preprocessing.crop_mode == "squash":
        return width, height
    if target[0] == target[1]:
        longer = int(width * max(w, h) / min(w, h))
        return (width, longer) if w <= h else (longer, height)
    ratio = min(h / height, w / width)
    return round(w / ratio), round(h / ratio)


def open_images(
    data: str | Path,
    arch: Architecture,
    preprocessing: Preprocessing,
    *,
    labeled: bool | None,
    class_map: str | Path | None = None,
) -> ImageSource:
    """Open an image folder, an ``.npz`` file, or ``"demo"``: the demo's test images, unless there
    is a folder of that name.

    Labels are the class folders, numbered by :func:`dfq.data.image_files.number_classes` or by the
    file ``class_map``; in an ``.npz`` file, ``y``.

    Args:
        labeled: True if labels are required, None to read them if there are any, False to
            ignore them.  A folder without class folders and an ``.npz`` without ``y`` have none.

    Raises:
        DataError: the data does not exist, is empty or unreadable, its classes do not fit the
            model, or ``class_map`` is given without class folders.
    """
    if arch.in_channels not in MODES:
        raise DataError(
            f"Images have 1, 3 or 4 channels; the model takes {arch.in_channels}, so there are "
            "none for it. Leave the data out: dfq inverts images of as many channels."
        )
    path = Path(data)
    is_folder, is_demo = path.is_dir(), str(data) == "demo"
    if class_map is not None and not is_folder:
        raise DataError(
            f"A class map numbers class folders; {str(data)!r} is no folder. Leave "
            f"{option('class_map')} out."
        )
    if is_demo and not is_folder:
        if arch.num_classes != len(demo.CLASSES) or arch.in_channels != 1:
            raise DataError(
                f"The demo's test images have {len(demo.CLASSES)} classes and 1 channel; the "
                f"model has {arch.num_classes} and {arch.in_channels}. Give your own images "
                "instead of 'demo'."
            )
        return _open_npz(demo.TEST_SLICE, "demo", arch, preprocessing, labeled)
    if is_folder:
        return _open_folder(path, arch, preprocessing, labeled, class_map)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, str(path), arch, preprocessing, labeled)
    what = "has an unknown type" if path.exists() else "does not exist"
    raise DataError(f"{str(path)!r} {what}; give an image folder, an .npz file, or 'demo'.")


def _open_npz(
    path: Path,
    name: str,
    arch: Architecture,
    preprocessing: Preprocessing,
    labeled: bool | None,
) -> ArrayImages:
    with (
        explained(lambda e: DataError(f"{str(path)!r} cannot be read as .npz: {e}.")),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as content,
    ):
        arrays = {key: content[key] for key in ("x", "y") if key in content.files}
        keys = content.files
    x, y = arrays.get("x"), arrays.get("y")
    if x is None or (labeled and y is None):
        raise DataError(f"{str(path)!r} needs arrays x{' and y' if labeled else ''}, has {keys}.")
    channels = x.shape[3] if x.ndim == 4 else 1
    if np.issubdtype(x.dtype, np.floating):
        check_values(x, arch, preprocessing, str(path))
    elif x.dtype != np.uint8 or x.ndim not in (3, 4) or channels not in (1, 3, 4):
        raise DataError(
            f"{str(path)!r}: x is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W] or "
            "[N, H, W, C] with 1, 3 or 4 channels, or floating-point values in the input range."
        )
    else:
        check_pixels(preprocessing, str(path))
    if not x.size:
        raise DataError(f"{str(path)!r} holds no images.")
    if y is not None:
        if y.ndim != 1 or len(y) != len(x) or not np.issubdtype(y.dtype, np.integer):
            raise DataError(
                f"{str(path)!r}: y is {y.dtype} {list(y.shape)}; expected {len(x)} whole numbers."
            )
        if labeled is not False:
            _check_labels(int(y.min()), int(y.max()), label_count(arch), str(path))
    return ArrayImages(name, x, y, arch, preprocessing)


def _check_labels(low: int, high: int, classes: int, name: str) -> None:
    if low < 0 or high >= classes:
        raise DataError(
            f"{name!r} has labels from {low} to {high}, but the model has {classes} "
            f"classes (0 to {classes - 1})."
        )


def _open_folder(
    path: Path,
    arch: Architecture,
    preprocessing: Preprocessing,
    labeled: bool | None,
    class_map: str | Path | None,
) -> FolderImages:
    check_pixels(preprocessing, str(path))
    folders = [] if labeled is False else class_folders(path)
    if not folders and (labeled or class_map is not None):
        raise DataError(f"{str(path)!r} has no class folders; labels are the names of folders.")
    if not folders:
        files = tuple(image_files(path))
        if not files:
            nor = " and no class folders" if labeled is None else ""
            endings = ", ".join(sorted(EXTENSIONS))
            raise DataError(f"{str(path)!r} holds no images ({endings}){nor}.")
        return FolderImages(str(path), files, None, arch, preprocessing)
    names, classes = [folder.name for folder in folders], label_count(arch)
    if class_map is None:
        numbers = number_classes(names, classes, str(path))
    else:
        named = read_class_map(Path(class_map), classes)
        numbers = map_classes(names, named, str(path), str(class_map))
    root = frozenset([os.path.realpath(path)])
    labeled_files = [(f, numbers.index[c.name]) for c in folders for f in image_files(c, root)]
    if not labeled_files:
        raise DataError(f"{str(path)!r} holds no images in its {len(folders)} class folders.")
    files, labels = zip(*labeled_files, strict=True)
    return FolderImages(str(path), files, labels, arch, preprocessing, numbers.order)


def load_batches(
    source: ImageSource, preprocessing: Preprocessing, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield normalized float32 images ``[B, C, H, W]`` with labels int64 ``[B]`` or None."""
    for start in range(0, len(source), size):
        pixels, labels = _read(source, range(start, min(start + size, len(source))))
        known = None if source.class_order is None else labels
        yield images_to_input(pixels, preprocessing), known


def _read(source: ImageSource, indices: Any) -> tuple[Tensor, Tensor]:
    arrays = [source.pixels(i) for i in indices]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor([source.label(i) for i in indices], dtype=torch.int64)


class DenseImages:
    """Real images as a calibration set with all patches."""

    def __init__(self, source: ImageSource, arch: Architecture, limit: int) -> None:
        """Take at most ``limit`` images, evenly spaced in the source."""
        self.grid = arch.grid
        self._source = source
        count = min(limit, len(source))
        self._indices = [i * len(source) // count for i in range(count)]

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, size: int) -> Iterator[SparseImages]:
        """Yield batches of at most ``size`` images with all their patches."""
        for start in range(0, len(self), size):
            indices = self._indices[start : start + size]
            pixels, labels = _read(self._source, indices)
            patches = patchify(pixels, self.grid)
            positions = torch.arange(self.grid.patches).expand(len(indices), -1)
            numbers = torch.arange(start, start + len(indices))
            yield SparseImages(patches, positions, labels, torch.zeros_like(labels), numbers)
