"""dfq's engine under the clock, and watched."""

from __future__ import annotations

from calibration_bench.measure.measure import Stopwatch, Trace
from calibration_bench.measure.methods import stages
from dfq import InversionSettings, LoadedModel, SparseImages
from dfq.inversion import Engine, Unit, Watch, plan_units


def run(loaded: LoadedModel, settings: InversionSettings, device: str) -> Trace:
    """Time one unit of work: ``settings.unit_size`` trajectories.

    The engine is made before the clock starts; all else (noise, iterations, selection,
    assembly of images) is timed.
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
    loaded: LoadedModel, settings: InversionSettings, unit: Unit, watch: Watch | None = None
) -> list[SparseImages]:
    """The images of a unit of work; ``precision`` and ``threads`` must be resolved."""
    return Engine(loaded.vit, loaded.preprocessing, settings).run(unit, watch=watch)


def images(loaded: LoadedModel, settings: InversionSettings) -> list[list[SparseImages]]:
    """The images of every unit of work."""
    units = plan_units(settings, loaded.vit.arch.grid.patches)
    return [unit_images(loaded, settings, unit) for unit in units]
