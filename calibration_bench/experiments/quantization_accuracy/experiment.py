"""Accuracy by calibration source, and ablation of the quantization settings.

Sources are inversion methods, noise, and real images if they are given.  Variants change the
quantization settings: the plain scheme with one technique after another added, and the default
without each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured
from calibration_bench.experiments.calibration_sources.tables import accuracy_tables
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import (
    REDUCE_RANGE,
    CalibrationOptions,
    Made,
    about,
    invert,
    load,
    quantize_each,
)
from calibration_bench.measure.sources import RealImages, make
from dfq import InversionSettings, QuantizationSettings
from dfq.errors import SettingError

REAL = "real"

PLAIN: dict[str, Any] = {
    "rounding": "nearest",
    "bias_correction": False,
    "group": 0,
    "equalize": 0.0,
    "damping": 0.01,
    "smooth": (),
    "fractal": 0,
}
"""Min-max ranges, rounding to nearest, one scale per channel, no augmentation."""

ORDER = (
    ("gptq", ("rounding",)),
    ("bias", ("bias_correction",)),
    ("groups", ("group",)),
    ("equalize", ("equalize",)),
    ("damping", ("damping",)),
    ("smooth", ("smooth",)),
    ("fractal", ("fractal",)),
)
"""Techniques in the order in which they are added, with their settings."""


def _variants() -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {"default": {}, "plain": PLAIN}
    rest = dict(PLAIN)
    for name, fields in ORDER:
        variants[f"without-{name}"] = {f: PLAIN[f] for f in fields}
        rest = {f: v for f, v in rest.items() if f not in fields}
        variants[f"plain+{name}"] = rest
    del variants[f"plain+{ORDER[-1][0]}"]
    for strength in (0.25, 0.75, 1.0):
        variants[f"equalize-{strength:g}"] = {"equalize": strength}
    for observer in ("percentile", "mse"):
        variants[observer] = {"observer": observer}
    return variants


VARIANTS = _variants()

NO_AUGMENTATION: dict[str, Any] = {"smooth": (), "fractal": 0}
"""Augmentation of real images: none."""


@dataclass(frozen=True)
class Options(CalibrationOptions):
    """Options of ``run quantization-accuracy``."""

    sources: str = option(
        "pri4,smi,dmi,noise",
        "Calibration sources: inversion methods, noise, and with --real also real.",
    )
    real: str | None = option(None, "Images of the source real: a folder or .npz.")
    variants: str = option("default", f"Variants of quantization: {', '.join(VARIANTS)}; or all.")
    bits: str = option("4,8", "Bits of the weights, 4 or 8.")
    attention: str = option("float", "Arithmetic of attention: float, int8 or both.")
    reduce_range: bool = option(QuantizationSettings().reduce_range, REDUCE_RANGE)
    iterations: int = option(InversionSettings().iterations, "Of inversion.")
    limit: int | None = option(256, "Number of test images, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed and source, so that images are made once for all variants."""
    at_least(options.limit, 1, "--limit")
    sources = words(options.sources, "--sources")
    if REAL in sources and options.real is None:
        raise SettingError("--sources has the source real; give its images with --real.")
    for source in sources:
        if source != REAL:
            Method(source)
    wanted = "all" if options.variants == "all" else "some"
    variants = (
        list(VARIANTS) if wanted == "all" else words(options.variants, "--variants", VARIANTS)
    )
    modes = words(options.attention, "--attention", ("float", "int8"))
    bench.notes.note(f"loading {options.model} and {options.data}")
    loaded, tested = load(options)
    shared = about(options, loaded, tested)
    seeds = numbers(options.seeds, "--seeds")
    drawn: dict[int, str] = {}
    if REAL in sources:
        real = RealImages(loaded, options.real, options.data, None)
        drawn = {seed: real.identity(options.images, seed, tested) for seed in seeds}
    return [
        {
            **shared,
            "source": source,
            "real": drawn[seed] if source == REAL else None,
            "iterations": 0 if source in (REAL, "noise") else options.iterations,
            "seed": seed,
            "variant": variant,
            "bits": bits,
            "attention": attention,
            "reduce_range": options.reduce_range,
        }
        for seed in seeds
        for source in sources
        for variant in variants
        for bits in numbers(options.bits, "--bits", 4)
        for attention in modes
    ]


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Quantize and compare; images are reused for consecutive keys with the same images."""
    return quantize_each(
        options,
        missing,
        bench,
        make=partial(_images, options),
        settings=_settings,
        images=("source", "seed"),
    )


def _images(options: Options, key: Key, out: Path) -> Made:
    """Make or open the images of a key."""
    if key["source"] == REAL:
        loaded = load(options)[0]
        real = RealImages(loaded, options.real, options.data, None)
        return make(options, loaded, real, key, out)
    made = invert(
        options, key["source"], key, iterations=key["iterations"], seed=key["seed"], out=out
    )
    return Made(made.path, made.seconds, made.bytes)


def _settings(key: Key) -> QuantizationSettings:
    changed = VARIANTS[key["variant"]]
    base = QuantizationSettings(
        bits=key["bits"], attention=key["attention"], reduce_range=key["reduce_range"]
    )
    augmentation = NO_AUGMENTATION if key["source"] == REAL else {}
    return dataclasses.replace(base, **{**changed, **augmentation})


EXPERIMENT = Experiment(Options, plan, measure, accuracy_tables)
