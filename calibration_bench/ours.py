"""dfq's engine under the clock, and watched."""

from __future__ import annotations

from calibration_bench.measure import Stopwatch, Trace
from calibration_bench.methods import stages
from dfq import InversionSettings, LoadedModel, SparseImages
from dfq.inversion import Engine, Watch, plan_units


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


def images(
    loaded: LoadedModel, settings: InversionSettings, watch: Watch | None = None
) -> list[list[SparseImages]]:
    """The images of every unit of work; ``precision`` and ``threads`` must be resolved."""
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    units = plan_units(settings, loaded.vit.arch.grid.patches)
    return [engine.run(unit, watch=watch) for unit in units]
