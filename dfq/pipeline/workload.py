"""Stages of a verb for the estimate of the remaining time, with the work of inversion in each.

Other work is not estimated: its speed does not follow from that of inversion.
"""

from __future__ import annotations

from dfq.inversion import plan_units
from dfq.inversion.schedule import events
from dfq.job import Stage
from dfq.recipe import InversionSettings, Recipe

BACKWARD = 2
"""Cost of a backward pass in forward passes."""


def inverting(settings: InversionSettings, patches: int) -> Stage:
    """Return the stage of inversion, for a model with ``patches`` patches."""
    trajectories = sum(unit.trajectories for unit in plan_units(settings, patches))
    live, before, work = patches, 0, 0.0
    for event in events(settings, patches):
        work += (event.iteration - before) * live / patches
        before, live = event.iteration, live - (0 if event.stays else event.count)
    return Stage("Inverting", trajectories * (1 + BACKWARD) * work)


def quantize_stages(
    recipe: Recipe, patches: int, *, inverts: bool, measured_on: InversionSettings | int | None
) -> list[Stage]:
    """Return the stages of :func:`dfq.quantize`.

    ``inverts``: the calibration set is inverted and not the caller's.  ``measured_on``: settings
    of images that are inverted to measure agreement, the number of the caller's, or None.
    """
    stages = [inverting(recipe.inversion, patches)] if inverts else []
    stages += [Stage("Calibrating", 0)]
    stages += [Stage("Quantizing", 0)]
    if recipe.quantization.reconstruct:
        stages += [Stage("Reconstructing", 0)]
    if measured_on is None:
        return stages
    if isinstance(measured_on, int):
        return [*stages, Stage("Evaluating", 0)]
    return [*stages, inverting(measured_on, patches), Stage("Comparing", 0)]


def distill_stages(recipe: Recipe, patches: int, *, inverts: bool, tested: int) -> list[Stage]:
    """Return the stages of :func:`dfq.distill`; ``tested``: number of images that teacher and
    student are compared on."""
    stages = [inverting(recipe.inversion, patches)] if inverts else []
    stages += [Stage("Training", 0)]
    return [*stages, Stage("Evaluating", 0)] if tested else stages
