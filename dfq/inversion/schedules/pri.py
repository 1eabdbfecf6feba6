"""Patch Rebirth Inversion: groups of patches become sparse images along a trajectory."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from dfq.argument_names import option
from dfq.errors import SettingError
from dfq.inversion.schedules.method import Event, LeaveFirst, Method
from dfq.validation import Shares, settings


@settings
class Pri(Method):
    """Patch Rebirth Inversion (arXiv 2509.23235): at each of ``v`` iterations the N/v most
    important patches leave as one image, and the others go on."""

    name: ClassVar[str] = "pri"
    summary: ClassVar[str] = "Patch Rebirth Inversion"
    paper: ClassVar[str | None] = "2509.23235"

    stages: int = Field(
        default=4, ge=1, le=1024, description="images a trajectory yields, v of the paper"
    )
    leave_first: LeaveFirst = Field(
        default="most", description="whether the most or the least important patches leave first"
    )
    leave_at: Shares = Field(
        default=(),
        description=(
            "when images leave, as shares of T, rising, all but the last; empty: at equal steps"
        ),
    )

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        stages = self.stages
        for limit, what in ((patches, "patches"), (iterations, "iterations")):
            if stages > limit:
                raise SettingError(
                    f"There are {stages} stages, but only {limit} {what}; give at most "
                    f"{option('stages', limit)}."
                )
        bounds = [round(k * patches / stages) for k in range(stages + 1)]
        return tuple(
            Event(at, after - before, True, leave_first=self.leave_first)
            for at, (before, after) in zip(self.times(iterations), pairwise(bounds), strict=True)
        )

    def times(self, iterations: int) -> list[int]:
        """Return the iteration after which each image is finished."""
        stages = self.stages
        if not self.leave_at:
            return [round(k * iterations / stages) for k in range(1, stages + 1)]
        times = [*(round(share * iterations) for share in self.leave_at), iterations]
        if len(times) != stages or any(a >= b for a, b in pairwise([0, *times])):
            raise SettingError(
                f"leave_at is {list(self.leave_at)}, which is after {times[:-1]} of {iterations} "
                f"iterations; for stages = {stages} it takes {stages - 1} shares of T, each at "
                "least an iteration after the one before, and the last before the end."
            )
        return times

    def fitted(self, iterations: int, patches: int) -> Pri:
        """Return a copy with at most as many stages as patches and iterations.

        ``leave_at`` is dropped if the number of stages changes.
        """
        stages = min(self.stages, iterations, patches)
        if stages == self.stages:
            return self
        return dataclasses.replace(self, stages=stages, leave_at=())
