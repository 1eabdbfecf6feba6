"""Runs of dfq's inversion engine, timed or with a callback."""

from __future__ import annotations

from calibration_bench.measure.measure import Stopwatch, Trace
from calibration_bench.measure.methods import stages
from dfq import InversionSettings, LoadedModel, SparseImages
from dfq.inversion import Callback, Engine, Unit, plan_units


def run(loaded: LoadedModel, settings: InversionSettings, device: str) -> Trace:
    """Time one unit of work of ``settings.unit_size`` trajectories.

    Everything but the creation of the engine is timed: noise, iterations, selection of patches,
    assembly of images.
    """
    patches = loaded.vit.arch.grid.patches
    (unit,) = plan_units(settings, patches)
    engine = Engine(loaded.vit, loaded.preprocessing, settings, device)
    clock = Stopwatch(device)
    clock()
    engine.run(unit, clock)
    clock()
    return Trace.of(clock.moments, [s.length for s in stages(settings, patches)])


def unit_images(
    loaded: LoadedModel,
    settings: InversionSettings,
    unit: Unit,
    callback: Callback | None = None,
) -> list[SparseImages]:
    """Return the images of a unit of work; ``precision`` and ``threads`` must be resolved."""
    return Engine(loaded.vit, loaded.preprocessing, settings).run(unit, callback=callback)


def images(loaded: LoadedModel, settings: InversionSettings) -> list[list[SparseImages]]:
    """Return the images of all units of work."""
    units = plan_units(settings, loaded.vit.arch.grid.patches)
    return [unit_images(loaded, settings, unit) for unit in units]
