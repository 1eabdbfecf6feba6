"""Schedules: the events of a trajectory, and the division of the work into units."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from dfq.errors import SettingError
from dfq.inversion.losses import LOSSES
from dfq.inversion.schedules import METHODS, Event, Method
from dfq.inversion.schedules.method import OPTIMIZATION, RANKING
from dfq.recipe import InversionSettings


@dataclass(frozen=True)
class Unit:
    """A batch of trajectories that is optimized together, and the images it yields.

    ``sizes`` has a row per trajectory: the patches of each image that is kept of it.
    """

    index: int
    first_trajectory: int
    sizes: tuple[tuple[int, ...], ...]

    @property
    def trajectories(self) -> int:
        return len(self.sizes)

    @property
    def images(self) -> int:
        return sum(map(len, self.sizes))

    @property
    def shards(self) -> dict[int, int]:
        """Patches per image -> number of such images; one shard each."""
        return dict(sorted(Counter(k for row in self.sizes for k in row).items()))


def method_of(settings: InversionSettings) -> Method:
    """Return the method of the settings, with its fields."""
    return METHODS[settings.method].from_settings(settings)


def events(settings: InversionSettings, patches: int) -> tuple[Event, ...]:
    """Return the events of a trajectory that starts with ``patches`` patches.

    Raises:
        SettingError: the method's fields do not fit so many patches or iterations.
    """
    method = method_of(settings)
    schedule = method.events(settings.iterations, patches)
    if problem := _problem(schedule, settings.iterations, patches, method.ranks):
        raise SettingError(f"The schedule of method {settings.method!r} is wrong: {problem}.")
    return schedule


def _problem(schedule: tuple[Event, ...], iterations: int, patches: int, ranks: bool) -> str | None:
    """Return what is wrong with a schedule, None if it is valid."""
    times = [0, *(event.iteration for event in schedule)]
    if any(a > b for a, b in pairwise(times)) or times[-1] > iterations:
        return f"events at {times[1:]} of {iterations} iterations are not in order"
    live = patches
    for event in schedule:
        if not 0 < event.count <= live:
            return f"{event.count} of {live} live patches leave at iteration {event.iteration}"
        if event.count < live and not ranks:
            return (
                f"{event.count} of {live} live patches leave at iteration {event.iteration}, but "
                "the method does not rank patches (ranks = False)"
            )
        live -= 0 if event.stays else event.count
    return None if any(event.kept for event in schedule) else "it keeps no image"


def unused_fields(method: str) -> set[str]:
    """Return the fields that do not affect a method's images, and are not in their cache key."""
    kind = METHODS[method]
    unused = {name for other in METHODS.values() for name in other.field_names()} - {
        *kind.field_names()
    }
    if not kind.ranks:
        unused |= RANKING
    if not kind.optimizes:
        unused |= {
            *OPTIMIZATION,
            *(name for loss in LOSSES.values() for name in loss.field_names()),
        }
    return unused


def fit_stages(settings: InversionSettings, patches: int) -> InversionSettings:
    """Return settings with at most as many stages as patches and iterations, for every method.

    Settings of a method that would lose another field by this stay as they are.
    """
    for kind in METHODS.values():
        own = kind.from_settings(settings)
        fitted = own.fitted(settings.iterations, patches)
        changes = {n for n in kind.field_names() if getattr(own, n) != getattr(fitted, n)}
        if changes == {"stages"}:
            settings = fit(settings, patches, kind)
    return settings


def fit(
    settings: InversionSettings, patches: int, kind: type[Method] | None = None
) -> InversionSettings:
    """Return settings whose fields of a method, by default their own, fit the patches."""
    fitted = (
        (kind or METHODS[settings.method])
        .from_settings(settings)
        .fitted(settings.iterations, patches)
    )
    return dataclasses.replace(settings, **{n: getattr(fitted, n) for n in fitted.field_names()})


def plan_units(settings: InversionSettings, patches: int) -> tuple[Unit, ...]:
    """Cut the work into units, which depend on the settings alone.

    Every trajectory runs in whole; images beyond ``settings.images`` are dropped from
    the last stages of the last trajectory.
    """
    sizes = tuple(e.count for e in events(settings, patches) if e.kept)
    trajectories = -(-settings.images // len(sizes))
    units: list[Unit] = []
    for first in range(0, trajectories, settings.unit_size):
        rows = tuple(
            sizes[: settings.images - t * len(sizes)]
            for t in range(first, min(first + settings.unit_size, trajectories))
        )
        units.append(Unit(len(units), first, rows))
    return tuple(units)
