"""Calibration sets, and held-out images to measure agreement on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from dfq.argument_names import option
from dfq.data.augmentation import AugmentationSettings, AugmentedImages, fractal_noise, stretched
from dfq.data.dataset import SparseImageDataset
from dfq.data.images import DenseImages, open_images
from dfq.data.settings import SETTINGS
from dfq.errors import DataError, DatasetError, SettingError, nearest
from dfq.inversion.schedule import events, fit
from dfq.pipeline.comparison import (
    EVALUATION_BATCH,
    Comparison,
    compare,
    metric_of,
    sparse_batches,
)
from dfq.pipeline.synthesis import make_dataset
from dfq.progress import Progress
from dfq.quantization import QuantizedViT
from dfq.recipe import METHODS, InversionSettings, Recipe
from dfq.results.gates import check_decidable, decides
from dfq.results.intervals import images_to_decide
from dfq.results.values import CalibrationSource, Metric
from dfq.vit.load import LoadedModel

HELD_OUT_SEED = 1_000_003
"""Offset of the seed of held-out inverted images."""

OUTSIDE_IMAGES, OUTSIDE_FIRST = 32, 1_000_000
"""Number of images of fractal noise to measure agreement on, and the index of the first, above
those of the augmentation."""

OUTSIDE_BATCH = 8


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on.

    ``source``: description for results and checkpoints.  ``inversion``: inversion settings of the
    images; None for other images, or if a dataset has none.
    """

    images: SparseImageDataset | DenseImages
    source: CalibrationSource
    inversion: InversionSettings | None = None


def calibration_set(
    loaded: LoadedModel,
    recipe: Recipe,
    path: str | Path | None,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
    images: int | None = None,
) -> CalibrationSet:
    """Invert or open the images to calibrate or train on.

    Raises:
        SettingError: the dataset at ``path`` has another number of images than ``images``.
    """
    settings = recipe.inversion
    if path is None:
        dataset, cached = make_dataset(
            loaded, settings, out=None, device=device, cache=cache, progress=progress
        )
        origin = CalibrationSource(settings.method, len(dataset), str(dataset.path), cached)
        return CalibrationSet(dataset, origin, settings)
    if (Path(path) / SETTINGS).is_file():
        dataset = SparseImageDataset(path)
        _check_model(dataset, loaded)
        if images not in (None, len(dataset)):
            raise SettingError(
                f"{option('images')} is {images}, but the dataset {str(path)!r} of {len(dataset)} "
                f"is taken whole. Leave {option('images')} out, or make a dataset of that many."
            )
        origin = CalibrationSource(dataset.method, len(dataset), str(path), None)
        return CalibrationSet(dataset, origin, dataset.inversion)
    if not Path(path).exists() and str(path) != "demo":
        raise DataError(
            f"{str(path)!r} is neither a method ({', '.join(METHODS)}) nor an existing "
            f"sparse-image dataset, image folder or .npz.{nearest(str(path), METHODS)}"
        )
    source = open_images(path, loaded.vit.arch, loaded.preprocessing, labeled=False)
    dense = DenseImages(source, loaded.vit.arch, settings.images)
    return CalibrationSet(dense, CalibrationSource("images", len(dense), str(path), None))


def augmented(
    source: SparseImageDataset | DenseImages, settings: AugmentationSettings
) -> SparseImageDataset | DenseImages | AugmentedImages:
    """Return inverted images with their augmentation; other images unchanged."""
    noise = [name for name, method in METHODS.items() if not method.optimizes]
    if isinstance(source, SparseImageDataset) and source.method not in noise:
        return AugmentedImages(source, settings)
    return source


def _check_model(dataset: SparseImageDataset, loaded: LoadedModel) -> None:
    if dataset.fingerprint != loaded.fingerprint:
        made_from = dataset.settings.get("model", {}).get("name", "unknown")
        raise DatasetError(
            f"The dataset {str(dataset.path)!r} was made from another model ({made_from!r}, "
            f"fingerprint {dataset.fingerprint[:12]}) than {loaded.name!r} (fingerprint "
            f"{loaded.fingerprint[:12]}). Invert this model, or use the weights it was made from."
        )
    if dataset.grid != loaded.vit.arch.grid:
        raise DatasetError(
            f"The dataset {str(dataset.path)!r} has a grid of {dataset.grid}, the model one of "
            f"{loaded.vit.arch.grid}. Make the dataset again."
        )


def held_out_settings(
    settings: InversionSettings,
    patches: int,
    metric: Metric = "top1",
    min_agreement: float | None = None,
) -> InversionSettings:
    """Return the calibration set's settings with another seed, and PRI instead of noise.

    They give the images of one unit of work, or as many as the calibration set has if fewer cannot
    decide ``min_agreement``.

    Raises:
        SettingError: as many cannot decide it either.
    """
    method = settings.method if METHODS[settings.method].optimizes else InversionSettings().method
    chosen = fit(dataclasses.replace(settings, method=method), patches)
    images = settings.unit_size * sum(event.kept for event in events(chosen, patches))
    if min_agreement is not None and metric != "cosine" and not decides(min_agreement, images):
        images = max(images, settings.images)
        needed = images_to_decide(min_agreement)
        advice = (
            f"give real ones ({option('eval', metavar='DATA')}), or invert as many "
            f"({option('images', needed)})"
        )
        check_decidable("min_agreement", min_agreement, images, advice)
    return dataclasses.replace(
        chosen,
        seed=(settings.seed + HELD_OUT_SEED) % 2**31,
        images=images,
    )


def compare_held_out(
    loaded: LoadedModel,
    quantized: QuantizedViT,
    settings: InversionSettings,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
) -> Comparison:
    """Compare the models on images of :func:`held_out_settings`, unseen by calibration."""
    dataset, _ = make_dataset(
        loaded,
        settings,
        out=None,
        device=device,
        cache=cache,
        progress=progress,
        purpose="held-out ",
    )
    batches = sparse_batches(dataset.batches(EVALUATION_BATCH), loaded.vit, loaded.preprocessing)
    return compare(quantized, loaded.vit, batches, metric=metric_of(loaded.vit.arch))


def compare_outside(loaded: LoadedModel, quantized: QuantizedViT, progress: Progress) -> Comparison:
    """Compare the models on images made without the model: fractal noise from black to white.

    The model is most confident on inverted images, and calibration saw similar ones; fractal noise
    shows whether the quantized model agrees with the float one on other images too.
    """
    arch = loaded.vit.arch
    starts = range(OUTSIDE_FIRST, OUTSIDE_FIRST + OUTSIDE_IMAGES, OUTSIDE_BATCH)
    images = (stretched(fractal_noise(OUTSIDE_BATCH, arch.grid, first)) for first in starts)
    batches = sparse_batches(images, loaded.vit, loaded.preprocessing)
    with progress.task("Comparing on fractal noise", OUTSIDE_IMAGES) as advance:
        return compare(quantized, loaded.vit, batches, advance, metric=metric_of(arch))
