"""PRI, SMI and DMI as data: who leaves a trajectory when, and whether they are kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from dfq.errors import SettingError
from dfq.recipe import InversionSettings


@dataclass(frozen=True)
class Event:
    """After ``iteration`` steps ``count`` patches of each trajectory leave.

    ``kept`` events make an image of them; the others drop them.  With ``stays`` the image
    is a copy, and its patches go on.
    """

    iteration: int
    count: int
    kept: bool
    stays: bool = False


@dataclass(frozen=True)
class Unit:
    """A batch of trajectories that is optimised together, and the images it yields.

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


def events(settings: InversionSettings, patches: int) -> tuple[Event, ...]:
    """The events of a trajectory that starts with ``patches`` patches.

    PRI (arXiv 2509.23235): at each of ``v`` uniform iterations the N/v most important
    patches leave as one image.  SMI (arXiv 2510.27186): at four early iterations 30 % of
    the live patches are dropped.  DMI (arXiv 1912.08795): all patches stay to the end; with
    ``snapshots`` an image of all is saved on the way as often as that.

    Raises:
        SettingError: more stages than patches or iterations, ``leave_at`` does not fit them,
            or nothing is left to keep.
    """
    total = settings.iterations
    if settings.method == "noise":
        return (Event(0, patches, True),)
    if settings.method == "pri":
        return _pri(settings, patches)
    if settings.method == "dmi":
        return _dmi(settings.snapshots, total, patches)
    found: list[Event] = []
    if settings.method == "smi":
        for share in sorted(settings.prune_at):
            count = round(patches * settings.prune_share)
            patches -= count
            if count:
                found.append(Event(min(total, max(1, round(share * total))), count, False))
        if patches < 1:
            raise SettingError(
                f"prune_share {settings.prune_share} at {settings.prune_at} leaves no patch."
            )
    return (*found, Event(total, patches, True))


def _dmi(snapshots: int, total: int, patches: int) -> tuple[Event, ...]:
    if snapshots > total:
        raise SettingError(f"snapshots is {snapshots}, but there are only {total} iterations.")
    return tuple(
        Event(round(k * total / snapshots), patches, True, stays=k < snapshots)
        for k in range(1, snapshots + 1)
    )


def _pri(settings: InversionSettings, patches: int) -> tuple[Event, ...]:
    stages, total = settings.stages, settings.iterations
    for limit, what in ((patches, "patches"), (total, "iterations")):
        if stages > limit:
            raise SettingError(
                f"stages is {stages}, but there are only {limit} {what}; "
                f"give at most {limit} (stages = {limit}, --stages {limit})."
            )
    return tuple(
        Event(at, round(k * patches / stages) - round((k - 1) * patches / stages), True)
        for k, at in enumerate(_detachments(settings), 1)
    )


def _detachments(settings: InversionSettings) -> list[int]:
    """After how many iterations each image of a PRI trajectory leaves."""
    stages, total = settings.stages, settings.iterations
    if not settings.leave_at:
        return [round(k * total / stages) for k in range(1, stages + 1)]
    found = [*(round(share * total) for share in settings.leave_at), total]
    if len(found) != stages or any(a >= b for a, b in pairwise([0, *found])):
        raise SettingError(
            f"leave_at is {list(settings.leave_at)}, which is after {found[:-1]} of {total} "
            f"iterations; for stages = {stages} it takes {stages - 1} shares of T, each at least "
            "an iteration after the one before, and the last before the end."
        )
    return found


def fit_stages(settings: InversionSettings, patches: int) -> InversionSettings:
    """The settings with no more stages than there are patches and iterations."""
    if settings.leave_at:
        return settings
    most = min(settings.stages, settings.iterations, patches)
    return dataclasses.replace(settings, stages=most)


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
