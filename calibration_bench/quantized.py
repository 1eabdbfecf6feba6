"""From a calibration source to figures of the quantized model, for several experiments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import dfq
from calibration_bench.logits import (
    LabelledImages,
    compare,
    first_image,
    logits,
    open_data,
)
from calibration_bench.methods import Method
from calibration_bench.options import option
from calibration_bench.registry import Bench, Key, Row
from dfq import InversionSettings, InvertResult, LoadedModel, QuantizationSettings
from dfq.device import resolve_precision
from dfq.files import make_directory

FLOATS = "float-logits"
"""Directory of the float models' logits, in that of the results."""


@dataclass(frozen=True)
class Tested:
    """Options that name a model, the images that it is tested on, and those to make."""

    model: str = option("demo", "A model with a classifier, as for dfq quantize.")
    weights: Path | None = option(None, "Its weights.")
    num_classes: int | None = option(None, "Classes of its head.")
    img_size: int | None = option(None, "Side of its input in pixels.")
    data: str = option("demo", "Labelled image folder, .npz, or 'demo'.")
    limit: int | None = option(None, "Test on the first so many images only.")
    images: int = option(32, "Images to make and calibrate on.")
    seeds: str = option("0,1,2", "Seeds of noise, targets and jitter.")
    precision: str = option("auto", "Of inversion: auto, float32 or bfloat16.")
    threads: int | None = option(None, "Threads; left out: torch's.")


def model_arguments(options: Tested) -> dict[str, Any]:
    """Arguments that dfq's functions take beside the model's name."""
    return {
        "weights": options.weights,
        "num_classes": options.num_classes,
        "img_size": options.img_size,
    }


@lru_cache(maxsize=1)
def load(options: Tested) -> tuple[LoadedModel, LabelledImages]:
    """The float model and the test images."""
    loaded = dfq.load_model(options.model, **model_arguments(options))
    return loaded, open_data(options.data, loaded, options.limit)


def about(options: Tested, loaded: LoadedModel, data: LabelledImages) -> Key:
    """What all keys of a run share."""
    return {
        "model": options.model,
        "fingerprint": loaded.fingerprint[:16],
        "data": data.name,
        "data_digest": data.digest[:16],
        "test_images": len(data),
        "images": options.images,
        "precision": resolve_precision(options.precision, torch.device("cpu")),
        "threads": options.threads or torch.get_num_threads(),
    }


def scratch(bench: Bench) -> Path:
    """A directory of the results for what is not kept."""
    path = bench.results / "scratch"
    make_directory(path)
    return path


def invert(
    options: Tested, name: str, key: Key, *, iterations: int, seed: int, out: Path
) -> InvertResult:
    """Images of a method, made anew in ``out``."""
    settings = inversion(Method(name), key, iterations=iterations, seed=seed)
    recipe = dfq.Recipe(inversion=settings)
    return dfq.invert(options.model, out=out, recipe=recipe, **model_arguments(options))


def inversion(method: Method, key: Key, *, iterations: int, seed: int) -> InversionSettings:
    """The settings of a method; noise has no iterations."""
    given = {name: key[name] for name in ("images", "precision", "threads")}
    effort = {} if method.name == "noise" else {"iterations": iterations}
    return method.settings(**given, **effort, seed=seed)


def quantize(
    options: Tested,
    source: str,
    settings: QuantizationSettings,
    directory: Path,
    reference: torch.Tensor,
) -> Row:
    """Quantize from images in ``source`` and compare with the float logits.

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
        recipe=dfq.Recipe(
            quantization=settings, inversion=InversionSettings(images=options.images)
        ),
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
