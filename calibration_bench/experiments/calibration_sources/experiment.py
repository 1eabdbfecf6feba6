"""Accuracy and cost by calibration source: the main table.

Every source becomes a sparse-image dataset and is quantized with dfq's defaults, with and without
dfq's augmentation, which separates the effect of inversion from that of augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured
from calibration_bench.experiments.calibration_sources.tables import source_plots, source_tables
from calibration_bench.measure.quantized import (
    REDUCE_RANGE,
    ModelOptions,
    about,
    check_inversion,
    load,
    quantize_each,
)
from calibration_bench.measure.sources import RealImages, Source, make
from dfq import QuantizationSettings
from dfq.errors import SettingError

SOURCES = "real,noise,noise+coverage,uniform,fractal,dmi,smi,pri2,pri4,pri7,pri4+coverage"


@dataclass(frozen=True)
class Options(ModelOptions):
    """Options of ``run calibration-sources``."""

    sources: str = option(
        SOURCES,
        "Calibration sources: real, noise, uniform, fractal, dmi, smi, pri4, ...; each also "
        "as NAME+coverage, with dfq's augmentation.",
    )
    real: str | None = option(
        None,
        "Images of the source real: a folder or .npz; by default those of --data after --limit.",
    )
    counts: str = option("8,32", "Numbers of calibration images.")
    bits: str = option("8,4", "Bits of the weights, 4 or 8.")
    reduce_range: bool = option(QuantizationSettings().reduce_range, REDUCE_RANGE)
    iterations: int = option(24, "Of inversion.")
    limit: int | None = option(256, "Number of test images, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed and source, so that images are made once for all schemes."""
    at_least(options.limit, 1, "--limit")
    at_least(options.iterations, 1, "--iterations")
    sources = [Source(name) for name in words(options.sources, "--sources")]
    counts = numbers(options.counts, "--counts", 1)
    bench.notes.note(f"loading {options.model} and {options.data}")
    loaded, tested = load(options)
    shared = about(options, loaded, tested)
    seeds = numbers(options.seeds, "--seeds")
    real: dict[tuple[int, int], str] = {}
    if any(source.base == "real" for source in sources):
        images = _real(options)
        images.need(max(counts))
        real = {(s, n): images.identity(n, s, tested) for s in seeds for n in counts}
    for source in sources:
        check_inversion(source.base, shared, min(counts), options.iterations, loaded)
    bases = [source.base for source in sources]
    sources.sort(key=lambda source: bases.index(source.base))
    return [
        {
            **shared,
            "source": source.name,
            "real": real.get((seed, count)) if source.base == "real" else None,
            "images": count,
            "iterations": options.iterations if source.inverted else 0,
            "seed": seed,
            "bits": bits,
            "reduce_range": options.reduce_range,
        }
        for seed in seeds
        for count in counts
        for source in sources
        for bits in _bits(options)
    ]


def _bits(options: Options) -> list[int]:
    bits = numbers(options.bits, "--bits", 1)
    if not set(bits) <= {4, 8}:
        raise SettingError(f"--bits is {options.bits!r}; give 4, 8 or both.")
    return bits


def _real(options: Options) -> RealImages:
    return RealImages(load(options)[0], options.real, options.data, options.limit)


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Quantize and compare; images are reused for consecutive keys with the same images."""
    loaded, _ = load(options)
    real = _real(options) if any(Source(k["source"]).base == "real" for k in missing) else None
    keys = [{**key, "base": Source(key["source"]).base} for key in missing]
    measured = quantize_each(
        options,
        keys,
        bench,
        make=partial(make, options, loaded, real),
        settings=_settings,
        images=("base", "images", "seed"),
    )
    for key, result in zip(missing, measured, strict=True):
        yield Measured(key, result.row)


def _settings(key: Key) -> QuantizationSettings:
    plain: dict[str, Any] = {} if Source(key["source"]).augmented else {"smooth": (), "fractal": 0}
    return QuantizationSettings(
        bits=cast(Any, key["bits"]), reduce_range=key["reduce_range"], **plain
    )


EXPERIMENT = Experiment(Options, plan, measure, source_tables, source_plots)
