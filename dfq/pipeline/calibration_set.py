"""The images that a verb works on: its calibration set, and others that set does not hold."""

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
"""Added to the seed of the images on which agreement is measured without data."""

OUTSIDE_IMAGES, OUTSIDE_FIRST = 32, 1_000_000
"""How many images of fractal noise agreement is measured on, and the index of the first, which is
beyond all that calibration takes."""

OUTSIDE_BATCH = 8


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on.

    ``source``: what results and checkpoints say of them.  ``inversion``: settings that they were
    inverted with; None of other images, or if a dataset does not say.
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
    """Make or open the images that a verb works on.

    Raises:
        SettingError: the caller asked for so many ``images`` and named a dataset of others.
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
    """Inverted images with what makes them cover real ones; other images as they are."""
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
    """As the calibration set's, but of another seed and never noise.

    They make the images of one unit of work; as many as calibration's where fewer cannot
    decide ``min_agreement``.

    Raises:
        SettingError: those cannot decide it either.
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
    """Compare on the images of :func:`held_out_settings`, which calibration did not see."""
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
    """Compare on images that were made without the model: fractal noise from black to white.

    Inverted images are those that the model is surest of, and calibration has seen their like;
    these tell whether the quantized model follows the float one elsewhere too.
    """
    arch = loaded.vit.arch
    starts = range(OUTSIDE_FIRST, OUTSIDE_FIRST + OUTSIDE_IMAGES, OUTSIDE_BATCH)
    images = (stretched(fractal_noise(OUTSIDE_BATCH, arch.grid, first)) for first in starts)
    batches = sparse_batches(images, loaded.vit, loaded.preprocessing)
    with progress.task("Comparing on fractal noise", OUTSIDE_IMAGES) as advance:
        return compare(quantized, loaded.vit, batches, advance, metric=metric_of(arch))
