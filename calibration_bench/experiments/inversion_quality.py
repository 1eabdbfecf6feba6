"""What calibration on inverted images is worth, over the effort of inverting them.

Every method is swept over iterations and seeds; the summary is each method's knee: the
least time whose accuracy is as good as the method's best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

import dfq
from calibration_bench.logits import (
    LabelledImages,
    compare,
    first_image,
    float_logits,
    logits,
    open_data,
)
from calibration_bench.methods import Method
from calibration_bench.options import at_least, numbers, option, words
from calibration_bench.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.tables import quality_tables
from dfq import LoadedModel
from dfq.device import resolve_precision
from dfq.errors import SettingError
from dfq.files import make_directory

FLOATS = "float-logits"
"""Directory of the float models' logits, in that of the results."""


@dataclass(frozen=True)
class Options:
    """What ``run inversion-quality`` takes."""

    model: str = option("demo", "A model with a classifier, as for dfq quantize.")
    weights: Path | None = option(None, "Its weights.")
    num_classes: int | None = option(None, "Classes of its head.")
    img_size: int | None = option(None, "Side of its input in pixels.")
    data: str = option("demo", "Labelled image folder, .npz, or 'demo'.")
    limit: int | None = option(None, "Test on the first so many images only.")
    methods: str = option("dmi,smi,pri2,pri4,pri7", "Methods; noise is one too.")
    iterations: str = option("10,25,50,100,200,400", "Iterations of a trajectory to try.")
    seeds: str = option("0,1,2", "Seeds of noise, targets and jitter.")
    images: int = option(32, "Images to make and calibrate on.")
    bits: int = option(4, "Of the weights: 4 or 8.")
    precision: str = option("auto", "Of inversion: auto, float32 or bfloat16.")
    threads: int | None = option(None, "Threads; left out: torch's.")


@lru_cache(maxsize=1)
def _load(options: Options) -> tuple[LoadedModel, LabelledImages]:
    """The float model and the test images."""
    loaded = dfq.load_model(options.model, **_model(options))
    return loaded, open_data(options.data, loaded, options.limit)


def _model(options: Options) -> dict[str, Any]:
    """Arguments that dfq's functions take beside the model's name."""
    return {
        "weights": options.weights,
        "num_classes": options.num_classes,
        "img_size": options.img_size,
    }


def plan(options: Options, bench: Bench) -> list[Key]:
    """Seed by seed and effort by effort over the methods, so that they take turns."""
    at_least(options.limit, 1, "--limit")
    methods = [Method(name) for name in words(options.methods, "--methods")]
    efforts = numbers(options.iterations, "--iterations", 1)
    seeds = numbers(options.seeds, "--seeds")
    deepest = max(method.images for method in methods)
    if min(efforts) < deepest:
        raise SettingError(f"--iterations has {min(efforts)}; --methods need at least {deepest}.")
    bench.notes.note(f"reading {options.model} and {options.data}")
    about = _about(options, *_load(options))
    keys = [
        {**about, "method": m.name, "iterations": 0 if m.name == "noise" else t, "seed": seed}
        for seed in seeds
        for t in efforts
        for m in methods
    ]
    return [key for at, key in enumerate(keys) if key not in keys[:at]]


def _about(options: Options, loaded: LoadedModel, data: LabelledImages) -> Key:
    """What all keys share."""
    return {
        "model": options.model,
        "fingerprint": loaded.fingerprint[:16],
        "data": data.name,
        "data_digest": data.digest[:16],
        "test_images": len(data),
        "images": options.images,
        "bits": options.bits,
        "precision": resolve_precision(options.precision, torch.device("cpu")),
        "threads": options.threads or torch.get_num_threads(),
    }


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Invert, quantize and compare, one key after the other."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = _load(options)
    bench.notes.note(f"float model on {len(data)} images")
    reference = float_logits(loaded, data, bench.results / FLOATS)
    for number, key in enumerate(missing, 1):
        bench.notes.note(
            f"{number} of {len(missing)}: {key['method']}, {key['iterations']} iterations, "
            f"seed {key['seed']}"
        )
        with tempfile.TemporaryDirectory(dir=_scratch(bench)) as directory:
            found = _one(options, key, Path(directory), data)
            ours = logits(dfq.load(found.pop("checkpoint")), data, loaded.preprocessing)
        labels = torch.from_numpy(data.labels)
        yield Measured(key, {**found, **compare(ours, reference, labels)})


def _scratch(bench: Bench) -> Path:
    path = bench.results / "scratch"
    make_directory(path)
    return path


def _one(options: Options, key: Key, directory: Path, data: LabelledImages) -> Row:
    """Invert into a fresh directory and quantize from it.

    dfq measures every checkpoint that it makes; it is given a single image for that, and
    the bench compares with the float logits that it has.
    """
    method = Method(key["method"])
    given = {name: key[name] for name in ("images", "precision", "threads", "seed")}
    effort = {} if method.name == "noise" else {"iterations": key["iterations"]}
    recipe = dfq.Recipe(inversion=method.settings(**given, **effort))
    ready = partial(dict[str, Any], recipe=recipe, cache=directory, **_model(options))
    inverted = dfq.invert(options.model, out=directory / "images", **ready())
    first_image(data, directory / "one.npz")
    quantized = dfq.quantize(
        options.model,
        bits=options.bits,
        calibration=inverted.path,
        out=directory / "checkpoint",
        eval=directory / "one.npz",
        **ready(),
    )
    return {
        "invert_seconds": inverted.seconds,
        "seconds_per_image": inverted.seconds / inverted.images,
        "quantize_seconds": quantized.seconds.calibrate + quantized.seconds.quantize,
        "scheme": quantized.scheme,
        "checkpoint": quantized.checkpoint,
    }


EXPERIMENT = Experiment(Options, plan, measure, quality_tables)
