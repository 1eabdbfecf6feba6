"""From a calibration source to figures of the quantized model, for several experiments."""

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
"""Directory of the float models' logits, in that of the results."""


@dataclass(frozen=True)
class Subject:
    """Options that name a model and the images that it is tested on."""

    model: str = option("demo", "A model with a classifier, as for dfq quantize.")
    weights: Path | None = option(None, "Its weights.")
    num_classes: int | None = option(None, "Classes of its head.")
    img_size: int | None = option(None, "Side of its input in pixels.")
    data: str = option("demo", "Labeled image folder, .npz, or 'demo'.")
    limit: int | None = option(None, "Test on the first so many images only.")
    seeds: str = option("0,1,2", "Seeds of noise, targets and jitter.")
    precision: str = option("auto", "Of inversion: auto, float32, bfloat16, int8.")
    threads: int | None = option(None, "Threads; left out: torch's.")


@dataclass(frozen=True)
class Tested(Subject):
    """The same with one number of images to make."""

    images: int = option(32, "Images to make and calibrate on.")


REDUCE_RANGE = "Keep weights within -64..63, as dfq does by default; else the full range."
"""Help of the option of every experiment that quantizes."""


def model_arguments(options: Subject) -> dict[str, Any]:
    """Arguments that dfq's functions take beside the model's name."""
    return {
        "weights": options.weights,
        "num_classes": options.num_classes,
        "img_size": options.img_size,
    }


@lru_cache(maxsize=1)
def load(options: Subject) -> tuple[LoadedModel, LabeledImages]:
    """The float model and the test images."""
    loaded = dfq.load_model(options.model, **model_arguments(options))
    return loaded, open_data(options.data, loaded, options.limit)


def about(options: Subject, loaded: LoadedModel, data: LabeledImages) -> Key:
    """What all keys of a run share."""
    at_least(options.threads, 1, "--threads")
    InversionSettings(precision=cast(Any, options.precision))
    images = {"images": options.images} if isinstance(options, Tested) else {}
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
    """A directory of the results for what is not kept."""
    path = bench.results / "scratch"
    make_directory(path)
    return path


def invert(
    options: Subject, name: str, key: Key, *, iterations: int, seed: int, out: Path
) -> InvertResult:
    """Images of a method, made anew in ``out``."""
    return invert_settings(
        options, inversion(Method(name), key, iterations=iterations, seed=seed), out
    )


def invert_settings(options: Subject, settings: InversionSettings, out: Path) -> InvertResult:
    """Images made anew in ``out``, as settings say."""
    recipe = dfq.Recipe(inversion=settings)
    return dfq.invert(options.model, out=out, recipe=recipe, **model_arguments(options))


def inversion(method: Method, key: Key, *, iterations: int, seed: int) -> InversionSettings:
    """The settings of a method; noise has no iterations."""
    given = {name: key[name] for name in ("images", "precision", "threads")}
    given["classes"] = tuple(key.get("classes", ()))
    effort = {} if method.name == "noise" else {"iterations": iterations}
    return method.settings(**given, **effort, seed=seed)


def check_inversion(
    name: str, shared: Key, images: int, iterations: int, loaded: LoadedModel
) -> None:
    """Raise SettingError if a source that is inverted cannot be, before anything is measured."""
    if re.fullmatch(r"dmi|smi|pri\d+", name):
        key = {**shared, "images": images}
        settings = inversion(Method(name), key, iterations=iterations, seed=0)
        plan_units(settings, loaded.vit.arch.grid.patches)


@dataclass(frozen=True)
class Made:
    """Images to calibrate on: where they are, and what they cost."""

    path: str
    seconds: float
    bytes: int | None = None


def quantize_each(
    options: Subject,
    missing: list[Key],
    bench: Bench,
    *,
    make: Callable[[Key, Path], Made],
    settings: Callable[[Key], QuantizationSettings],
    images: tuple[str, ...],
) -> Iterator[Measured]:
    """Make images, quantize and compare, key by key.

    ``images`` names the columns of a key that decide its images: they are kept while the
    next key has the same.
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
                found = quantize(
                    options,
                    source.path,
                    settings(key),
                    Path(place),
                    reference,
                    images=key["images"],
                )
            cost = {"invert_seconds": source.seconds, "dataset_bytes": source.bytes}
            yield Measured(key, {**cost, **found})


SHOWN = ("source", "method", "images", "iterations", "seed", "variant", "bits", "attention")


def _title(key: Key) -> str:
    return ", ".join(f"{name} {key[name]}" for name in SHOWN if name in key)


def quantize(
    options: Subject,
    source: str,
    settings: QuantizationSettings,
    directory: Path,
    reference: torch.Tensor,
    *,
    images: int,
) -> Row:
    """Quantize from images in ``source``, of a folder at most so many of them, and compare
    with the float logits.

    dfq measures every checkpoint that it makes; it is given a single image for that, and
    the bench compares with the float logits that it has.
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
