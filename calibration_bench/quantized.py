"""From a calibration source to figures of the quantized model, for several experiments."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

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
from calibration_bench.registry import Bench, Key, Row
from dfq import InversionSettings, InvertResult, LoadedModel, QuantizationSettings
from dfq.device import resolve_precision
from dfq.files import make_directory

FLOATS = "float-logits"
"""Directory of the float models' logits, in that of the results."""


class Tested(Protocol):
    """Options that name a model and the images that it is tested on."""

    def __hash__(self) -> int: ...
    @property
    def model(self) -> str: ...
    @property
    def weights(self) -> Path | None: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def img_size(self) -> int | None: ...
    @property
    def data(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def images(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def threads(self) -> int | None: ...


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
