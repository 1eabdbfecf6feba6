"""Accuracy after calibration on inverted images, over the number of iterations.

Every method is swept over iterations and seeds and summarized by its knee: the shortest time whose
accuracy is about as good as the method's best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured
from calibration_bench.core.tables import quality_plots, quality_tables
from calibration_bench.measure.logits import float_logits
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import (
    FLOATS,
    REDUCE_RANGE,
    CalibrationOptions,
    about,
    invert,
    load,
    quantize,
    scratch,
)
from dfq import QuantizationSettings
from dfq.errors import SettingError


@dataclass(frozen=True)
class Options(CalibrationOptions):
    """Options of ``run inversion-quality``."""

    methods: str = option(
        "dmi,smi,pri4", "Inversion methods: dmi, smi, pri4 (with any number of stages), noise."
    )
    iterations: str = option("8,24,48", "Numbers of iterations of a trajectory.")
    bits: int = option(4, "Bits of the weights, 4 or 8.")
    reduce_range: bool = option(QuantizationSettings().reduce_range, REDUCE_RANGE)
    limit: int | None = option(256, "Number of test images, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed and iterations over the methods, so that these take turns."""
    at_least(options.limit, 1, "--limit")
    methods = [Method(name) for name in words(options.methods, "--methods")]
    efforts = numbers(options.iterations, "--iterations", 1)
    seeds = numbers(options.seeds, "--seeds")
    deepest = max(method.images for method in methods)
    if min(efforts) < deepest:
        raise SettingError(
            f"--iterations has {min(efforts)}; these --methods need at least {deepest}."
        )
    bench.notes.note(f"loading {options.model} and {options.data}")
    shared = {
        **about(options, *load(options)),
        "bits": options.bits,
        "reduce_range": options.reduce_range,
    }
    keys = [
        {**shared, "method": m.name, "iterations": 0 if m.name == "noise" else t, "seed": seed}
        for seed in seeds
        for t in efforts
        for m in methods
    ]
    return [key for at, key in enumerate(keys) if key not in keys[:at]]


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Invert, quantize and compare, one key after the other."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = load(options)
    bench.notes.note(f"float model on {len(data)} images")
    reference = float_logits(loaded, data, bench.results / FLOATS)
    settings = QuantizationSettings(bits=cast(Any, options.bits), reduce_range=options.reduce_range)
    for number, key in enumerate(missing, 1):
        method, effort, seed = key["method"], key["iterations"], key["seed"]
        bench.notes.note(f"{number} of {len(missing)}: {method}, {effort} iterations, seed {seed}")
        with tempfile.TemporaryDirectory(dir=scratch(bench)) as directory:
            place = Path(directory)
            made = invert(options, method, key, iterations=effort, seed=seed, out=place / "images")
            row = quantize(options, made.path, settings, place, reference, images=options.images)
        times = {
            "invert_seconds": made.seconds,
            "seconds_per_image": made.seconds / made.images,
        }
        yield Measured(key, {**times, **row})


EXPERIMENT = Experiment(Options, plan, measure, quality_tables, quality_plots)
