"""Quantization from a calibration source, and evaluation of the quantized model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

import dfq
from calibration_bench.core.options import at_least, option
from calibration_bench.core.registry import Bench, Key, Measured, Row
from calibration_bench.measure.logits import (
    LabeledImages,
    compare,
    first_image,
    float_logits,
    logits,
    open_data,
)
from calibration_bench.measure.methods import Method
from dfq import InversionSettings, InvertResult, LoadedModel, QuantizationSettings
from dfq.device import resolve_products
from dfq.files import make_directory
from dfq.inversion import plan_units

FLOATS = "float-logits"
"""Subdirectory of the results with cached logits of float models."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model, its test images, and inversion."""

    model: str = option("demo", "Model with a classifier, as for dfq quantize.")
    weights: Path | None = option(None, "Weights of the model: safetensors, or a torch file.")
    num_classes: int | None = option(None, "Classes of the model's head.")
    img_size: int | None = option(None, "Side of the images in pixels.")
    data: str = option("demo", "Labeled test images: a folder, an .npz or 'demo'.")
    limit: int | None = option(None, "Number of test images, the first of --data.")
    seeds: str = option("0,1,2", "Seeds of noise, targets and jitter.")
    precision: str = option("auto", "Precision of inversion: auto, float32, bfloat16 or int8.")
    threads: int | None = option(None, "CPU threads; by default PyTorch's number.")


@dataclass(frozen=True)
class CalibrationOptions(ModelOptions):
    """Options with a number of calibration images."""

    images: int = option(32, "Number of calibration images.")


REDUCE_RANGE = "Restrict integer weights to -64..63, dfq's default, or use the full range."
"""Help of the option ``reduce_range``."""


def model_arguments(options: ModelOptions) -> dict[str, Any]:
    """Return arguments of dfq's functions that go with the model's name."""
    return {
        "weights": options.weights,
        "num_classes": options.num_classes,
        "img_size": options.img_size,
    }


@lru_cache(maxsize=1)
def load(options: ModelOptions) -> tuple[LoadedModel, LabeledImages]:
    """Load the float model and the test images."""
    loaded = dfq.load_model(options.model, **model_arguments(options))
    return loaded, open_data(options.data, loaded, options.limit)


def about(options: ModelOptions, loaded: LoadedModel, data: LabeledImages) -> Key:
    """Return the part of the keys about model, test images, precision and threads."""
    at_least(options.threads, 1, "--threads")
    InversionSettings(precision=cast(Any, options.precision))
    images = {"images": options.images} if isinstance(options, CalibrationOptions) else {}
    return {
        **images,
        "model": options.model,
        "fingerprint": loaded.fingerprint[:16],
        "data": data.name,
        "data_digest": data.digest[:16],
        "test_images": len(data),
        "precision": resolve_products(options.precision, torch.device("cpu")),
        "threads": options.threads or torch.get_num_threads(),
    }


def scratch(bench: Bench) -> Path:
    """Create a subdirectory of the results for temporary files."""
    path = bench.results / "scratch"
    make_directory(path)
    return path


def invert(
    options: ModelOptions, name: str, key: Key, *, iterations: int, seed: int, out: Path
) -> InvertResult:
    """Invert images by a method into ``out``."""
    return invert_settings(
        options, inversion(Method(name), key, iterations=iterations, seed=seed), out
    )


def invert_settings(options: ModelOptions, settings: InversionSettings, out: Path) -> InvertResult:
    """Invert images with given settings into ``out``."""
    recipe = dfq.Recipe(inversion=settings)
    return dfq.invert(options.model, out=out, recipe=recipe, **model_arguments(options))


def inversion(method: Method, key: Key, *, iterations: int, seed: int) -> InversionSettings:
    """Return the inversion settings of a method; noise has no iterations."""
    given = {name: key[name] for name in ("images", "precision", "threads")}
    given["classes"] = tuple(key.get("classes", ()))
    effort = {} if method.name == "noise" else {"iterations": iterations}
    return method.settings(**given, **effort, seed=seed)


def check_inversion(
    name: str, shared: Key, images: int, iterations: int, loaded: LoadedModel
) -> None:
    """Raise SettingError for invalid inversion settings of a source, before any measurement."""
    if re.fullmatch(r"dmi|smi|pri\d+", name):
        key = {**shared, "images": images}
        settings = inversion(Method(name), key, iterations=iterations, seed=0)
        plan_units(settings, loaded.vit.arch.grid.patches)


@dataclass(frozen=True)
class Made:
    """Calibration images: their path, seconds of inversion, and size in bytes."""

    path: str
    seconds: float
    bytes: int | None = None


def quantize_each(
    options: ModelOptions,
    missing: list[Key],
    bench: Bench,
    *,
    make: Callable[[Key, Path], Made],
    settings: Callable[[Key], QuantizationSettings],
    images: tuple[str, ...],
) -> Iterator[Measured]:
    """Make images, quantize and compare, key by key.

    ``images``: columns of a key that determine its images, which are reused while these columns
    do not change.
    """
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = load(options)
    bench.notes.note(f"float model on {len(data)} images")
    reference = float_logits(loaded, data, bench.results / FLOATS)
    with tempfile.TemporaryDirectory(dir=scratch(bench)) as directory:
        made: dict[tuple[Any, ...], Made] = {}
        for number, key in enumerate(missing, 1):
            bench.notes.note(f"{number} of {len(missing)}: {_title(key)}")
            name = tuple(key[column] for column in images)
            if name not in made:
                made = {name: make(key, Path(directory) / str(number))}
            source = made[name]
            with tempfile.TemporaryDirectory(dir=directory) as place:
                row = quantize(
                    options,
                    source.path,
                    settings(key),
                    Path(place),
                    reference,
                    images=key["images"],
                )
            cost = {"invert_seconds": source.seconds, "dataset_bytes": source.bytes}
            yield Measured(key, {**cost, **row})


TITLE_COLUMNS = ("source", "method", "images", "iterations", "seed", "variant", "bits", "attention")


def _title(key: Key) -> str:
    return ", ".join(f"{name} {key[name]}" for name in TITLE_COLUMNS if name in key)


def quantize(
    options: ModelOptions,
    source: str,
    settings: QuantizationSettings,
    directory: Path,
    reference: torch.Tensor,
    *,
    images: int,
) -> Row:
    """Quantize from images in ``source`` and compare with the float logits.

    ``images``: how many to take of a folder.  dfq itself evaluates the checkpoint on a single
    image, as the bench compares all test images with cached float logits.
    """
    loaded, data = load(options)
    first_image(data, directory / "one.npz")
    result = dfq.quantize(
        options.model,
        calibration=source,
        out=directory / "checkpoint",
        eval=directory / "one.npz",
        recipe=dfq.Recipe(quantization=settings, inversion=InversionSettings(images=images)),
        cache=directory,
        **model_arguments(options),
    )
    ours = logits(dfq.load(result.checkpoint), data, loaded.preprocessing)
    return {
        "scheme": result.scheme,
        "quantize_seconds": result.seconds.calibrate + result.seconds.quantize,
        "bytes": result.bytes.quantized,
        **compare(ours, reference, torch.from_numpy(data.labels)),
    }
