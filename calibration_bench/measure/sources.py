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
from calibration_bench.measure.quantized import Made, Subject, invert
from dfq import LoadedModel, SparseImages
from dfq.data.images import ImageSource, open_images
from dfq.errors import DataError, SettingError, nearest
from dfq.inversion import seeded
from dfq.sparse import Grid, patchify

COVERED = "+coverage"
OTHERS = ("real", "noise", "uniform", "fractal")
APART = 4096
"""Fractal images of a seed begin at its multiple of this: dfq's own additions are those
below it."""


@dataclass(frozen=True)
class Source:
    """``pri4``: those images alone.  ``pri4+coverage``: with the images beside them that
    dfq's default settings add, which are the same whatever the source."""

    name: str

    def __post_init__(self) -> None:
        if self.base not in OTHERS:
            try:
                Method(self.base)
            except SettingError as error:
                raise SettingError(
                    f"No source is called {self.name!r}; there are {', '.join(OTHERS)}, dmi, smi, "
                    f"and pri with its number of stages, each also with {COVERED}."
                    f"{nearest(self.base, OTHERS)}"
                ) from error

    @property
    def base(self) -> str:
        return self.name.removesuffix(COVERED)

    @property
    def augmented(self) -> bool:
        return self.name.endswith(COVERED)

    @property
    def inverted(self) -> bool:
        return self.base not in OTHERS


class RealImages:
    """Images of the user's: those of ``real``, or those of ``data`` that a test leaves out.

    ``classes`` takes those of some classes alone, for which ``real`` must have labels.
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
        """Raise DataError if there are fewer."""
        if len(self) < count:
            raise DataError(
                f"{count} real images are asked for, and {self.name!r} has {len(self)} that are "
                "not tested on and of the classes asked for. Give others with --real, or test on "
                "fewer with --limit."
            )

    def sample(self, count: int, seed: int) -> SparseImages:
        """So many of them at random."""
        whole = torch.from_numpy(np.stack(self._drawn(count, seed))).permute(0, 3, 1, 2)
        return dense(patchify(whole, self.grid), self.grid)

    def identity(self, count: int, seed: int, tested: LabeledImages) -> str:
        """What :meth:`sample` draws: a name and the start of a SHA-256 over its pixels.

        Raises:
            DataError: there are fewer, or one of them is also tested on.
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
    """Whole images of uint8 patches ``[B, N, D]``, a trajectory each, without labels."""
    count = len(patches)
    return SparseImages(
        patches=patches.contiguous(),
        positions=torch.arange(grid.patches).expand(count, -1).contiguous(),
        labels=torch.full((count,), -1),
        stage=torch.zeros(count, dtype=torch.int64),
        trajectory=torch.arange(count),
    )


def uniform(count: int, grid: Grid, seed: int) -> SparseImages:
    """Images of one color each, every channel uniform over 0..255."""
    values = torch.randint(0, 256, (count, grid.channels), generator=seeded(seed, "uniform", 0))
    spread = values.repeat_interleave(grid.patch_size[0] * grid.patch_size[1], dim=1)
    return dense(spread[:, None].expand(-1, grid.patches, -1).to(torch.uint8), grid)


def make(
    options: Subject, loaded: LoadedModel, real: RealImages | None, key: Key, out: Path
) -> Made:
    """The images of ``key``: its ``source``, ``images``, ``iterations`` and ``seed``."""
    base, count, seed = Source(key["source"]).base, key["images"], key["seed"]
    grid = loaded.vit.arch.grid
    if base not in OTHERS:
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
        noise = dfq.fractal_noise(count, grid, APART * (seed + 1))
        units = [[dataclasses.replace(noise, trajectory=torch.arange(count))]]
    else:
        drawn = out.with_name(f"{out.name}-noise")
        path = invert(options, base, key, iterations=0, seed=seed, out=drawn).path
        units = dfq.SparseImageDataset(path).units()
    name = "gaussian" if base == "noise" else base
    written = dfq.write_dataset(out, units, loaded, origin=name, settings={"seed": seed})
    return Made(str(written.path), time.perf_counter() - started, written.bytes)
