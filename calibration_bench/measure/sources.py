"""Calibration sources by name, each written as a sparse-image dataset of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dfq
from calibration_bench.core.registry import Key
from calibration_bench.measure.logits import LabeledImages
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import Made, ModelOptions, invert
from dfq import LoadedModel, SparseImages
from dfq.data.images import ImageSource, open_images
from dfq.errors import DataError, SettingError, nearest
from dfq.inversion import seeded
from dfq.sparse import Grid, patchify

AUGMENTED = "+coverage"
NOT_INVERTED = ("real", "noise", "uniform", "fractal")
FRACTAL_IMAGES = 4096
"""Fractal images reserved for each seed; dfq's augmentation uses the first of them."""


@dataclass(frozen=True)
class Source:
    """Calibration source by name; ``pri4+coverage`` is ``pri4`` with dfq's augmentation, which
    is the same for every source."""

    name: str

    def __post_init__(self) -> None:
        if self.base not in NOT_INVERTED:
            try:
                Method(self.base)
            except SettingError as error:
                raise SettingError(
                    f"Unknown source {self.name!r}; known: {', '.join(NOT_INVERTED)}, dmi, smi, "
                    f"and pri with its number of stages, each also with {AUGMENTED}."
                    f"{nearest(self.base, NOT_INVERTED)}"
                ) from error

    @property
    def base(self) -> str:
        return self.name.removesuffix(AUGMENTED)

    @property
    def augmented(self) -> bool:
        return self.name.endswith(AUGMENTED)

    @property
    def inverted(self) -> bool:
        return self.base not in NOT_INVERTED


class RealImages:
    """Real images: those of ``real``, or those of ``data`` that are not tested on.

    ``classes``: take images of these classes only; ``real`` must then have labels.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        real: str | None,
        data: str,
        tested: int | None,
        classes: Sequence[int] = (),
    ) -> None:
        arch, preprocessing = loaded.vit.arch, loaded.preprocessing
        self.name, self._given = real or data, real is not None
        self.grid = arch.grid
        self._images: ImageSource = open_images(
            self.name, arch, preprocessing, labeled=real is None or bool(classes)
        )
        first = 0 if real else min(tested or len(self._images), len(self._images))
        indices = range(first, len(self._images))
        self._indices = [i for i in indices if not classes or self._images.label(i) in classes]

    def __len__(self) -> int:
        return len(self._indices)

    def need(self, count: int) -> None:
        """Raise DataError if there are fewer than ``count``."""
        if len(self) < count:
            raise DataError(
                f"{count} real images are needed, but {self.name!r} has {len(self)} of these "
                "classes that are not test images. Give others with --real, or lower --limit."
            )

    def sample(self, count: int, seed: int) -> SparseImages:
        """Draw ``count`` random images."""
        whole = torch.from_numpy(np.stack(self._drawn(count, seed))).permute(0, 3, 1, 2)
        return dense(patchify(whole, self.grid), self.grid)

    def identity(self, count: int, seed: int, tested: LabeledImages) -> str:
        """Identify the images of :meth:`sample`: name and first digits of their SHA-256.

        Raises:
            DataError: there are fewer images, or one of them is also a test image.
        """
        drawn = [pixels.tobytes() for pixels in self._drawn(count, seed)]
        known = set(drawn) if self._given else set()
        if any(pixels.tobytes() in known for pixels in tested.pixels):
            raise DataError(
                f"{self.name!r} holds images of {tested.name!r}, on which the result is tested. "
                "Give images to calibrate on that the test set does not have."
            )
        return f"{Path(self.name).name} {hashlib.sha256(b''.join(drawn)).hexdigest()[:16]}"

    def _drawn(self, count: int, seed: int) -> list[np.ndarray]:
        self.need(count)
        order = torch.randperm(len(self), generator=seeded(seed, "real", 0))[:count]
        return [self._images.pixels(self._indices[i]) for i in order.tolist()]


def dense(patches: torch.Tensor, grid: Grid) -> SparseImages:
    """Return uint8 patches ``[B, N, D]`` as whole images without labels, one per trajectory."""
    count = len(patches)
    return SparseImages(
        patches=patches.contiguous(),
        positions=torch.arange(grid.patches).expand(count, -1).contiguous(),
        labels=torch.full((count,), -1),
        stage=torch.zeros(count, dtype=torch.int64),
        trajectory=torch.arange(count),
    )


def uniform(count: int, grid: Grid, seed: int) -> SparseImages:
    """Return images of one random color each, uniform over 0..255."""
    values = torch.randint(0, 256, (count, grid.channels), generator=seeded(seed, "uniform", 0))
    spread = values.repeat_interleave(grid.patch_size[0] * grid.patch_size[1], dim=1)
    return dense(spread[:, None].expand(-1, grid.patches, -1).to(torch.uint8), grid)


def make(
    options: ModelOptions, loaded: LoadedModel, real: RealImages | None, key: Key, out: Path
) -> Made:
    """Make the images of a key from its ``source``, ``images``, ``iterations`` and ``seed``."""
    base, count, seed = Source(key["source"]).base, key["images"], key["seed"]
    grid = loaded.vit.arch.grid
    if base not in NOT_INVERTED:
        made = invert(options, base, key, iterations=key["iterations"], seed=seed, out=out)
        return Made(made.path, made.seconds, made.bytes)
    started = time.perf_counter()
    units: Iterable[list[SparseImages]]
    if base == "real":
        assert real is not None
        units = [[real.sample(count, seed)]]
    elif base == "uniform":
        units = [[uniform(count, grid, seed)]]
    elif base == "fractal":
        noise = dfq.fractal_noise(count, grid, FRACTAL_IMAGES * (seed + 1))
        units = [[dataclasses.replace(noise, trajectory=torch.arange(count))]]
    else:
        drawn = out.with_name(f"{out.name}-noise")
        path = invert(options, base, key, iterations=0, seed=seed, out=drawn).path
        units = dfq.SparseImageDataset(path).units()
    name = "gaussian" if base == "noise" else base
    written = dfq.write_dataset(out, units, loaded, origin=name, settings={"seed": seed})
    return Made(str(written.path), time.perf_counter() - started, written.bytes)
