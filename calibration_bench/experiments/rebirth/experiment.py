"""Ablation of re-birth: PRI compared with controls that each lack one part of it.

All variants make the same number of images with, up to rounding to whole iterations, the same
number of patch updates: an update is one step of Adam on one patch of one trajectory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.experiments.rebirth.tables import rebirth_tables
from calibration_bench.measure.methods import patch_updates
from calibration_bench.measure.quantized import (
    REDUCE_RANGE,
    CalibrationOptions,
    Made,
    about,
    invert_settings,
    load,
    quantize_each,
)
from calibration_bench.measure.variants import VARIANTS, equal_iterations
from dfq import InversionSettings, QuantizationSettings
from dfq.inversion import events, plan_units
from dfq.recipe import to_dict


@dataclass(frozen=True)
class Options(CalibrationOptions):
    """Options of ``run rebirth``."""

    variants: str = option(",".join(VARIANTS), "Variants to measure.")
    stages: int = option(4, "Stages (v): images of a PRI trajectory.")
    iterations: int = option(64, "Iterations of PRI; the others get as many patch updates.")
    bits: int = option(4, "Bits of the weights, 4 or 8.")
    reduce_range: bool = option(QuantizationSettings().reduce_range, REDUCE_RANGE)
    coverage: bool = option(False, "Also calibrate on dfq's augmentation of inverted images.")
    limit: int | None = option(256, "Number of test images, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed over the variants, so that these take turns."""
    at_least(options.limit, 1, "--limit")
    names = words(options.variants, "--variants", VARIANTS)
    QuantizationSettings(bits=cast(Any, options.bits))
    bench.notes.note(f"loading {options.model} and {options.data}")
    loaded, data = load(options)
    shared = {
        **about(options, loaded, data),
        "stages": options.stages,
        "coverage": options.coverage,
        "bits": options.bits,
        "reduce_range": options.reduce_range,
    }
    patches = loaded.vit.arch.grid.patches
    budget = patch_updates(_settings(shared, "pri", options.iterations, 0), patches)
    return [
        {
            **shared,
            "variant": name,
            "budget": budget,
            "iterations": _iterations(shared, name, patches, budget, options.iterations),
            "seed": seed,
        }
        for seed in numbers(options.seeds, "--seeds")
        for name in names
    ]


def _settings(key: Key, name: str, iterations: int, seed: int) -> InversionSettings:
    shared = {column: key[column] for column in ("images", "precision", "threads")}
    return VARIANTS[name].settings(key["stages"], iterations, seed=seed, **shared)


def _iterations(key: Key, name: str, patches: int, budget: int, given: int) -> int:
    if name.startswith("pri") and name not in ("pri-early", "pri-late"):
        return given
    v = key["stages"]
    return equal_iterations(lambda t: _settings(key, name, t, 0), patches, budget, v)


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Invert, quantize and compare, one key after the other."""
    patches = load(options)[0].vit.arch.grid.patches
    measured = quantize_each(
        options,
        missing,
        bench,
        make=partial(_make, options),
        settings=_quantization,
        images=("variant", "seed"),
    )
    for result in measured:
        key = result.key
        settings = _settings(key, key["variant"], key["iterations"], key["seed"])
        yield Measured(key, {**_effort(settings, patches), **result.row})


def _make(options: Options, key: Key, out: Path) -> Made:
    settings = _settings(key, key["variant"], key["iterations"], key["seed"])
    made = invert_settings(options, settings, out)
    return Made(made.path, made.seconds, made.bytes)


def _quantization(key: Key) -> QuantizationSettings:
    settings = QuantizationSettings(bits=cast(Any, key["bits"]), reduce_range=key["reduce_range"])
    return settings if key["coverage"] else dataclasses.replace(settings, smooth=(), fractal=0)


def _effort(settings: InversionSettings, patches: int) -> Row:
    """Return the patch updates and kept patches of a variant."""
    units = plan_units(settings, patches)
    kept = [event.iteration for event in events(settings, patches) if event.kept]
    return {
        "inversion": to_dict(settings),
        "trajectories": sum(unit.trajectories for unit in units),
        "patch_updates": patch_updates(settings, patches),
        "patches_kept": sum(sum(row) for unit in units for row in unit.sizes),
        "first_kept_at": kept[0],
        "last_kept_at": kept[-1],
    }


EXPERIMENT = Experiment(Options, plan, measure, rebirth_tables)
