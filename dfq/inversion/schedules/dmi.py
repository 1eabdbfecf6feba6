"""Dense model inversion: no patch is removed."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dfq.errors import SettingError
from dfq.inversion.schedules.method import Event, Method
from dfq.validation import settings


@settings
class Dmi(Method):
    """Dense model inversion, as DeepInversion (arXiv 1912.08795): no patch is removed.

    ``snapshots`` dense images are saved of each trajectory.
    """

    name: ClassVar[str] = "dmi"
    summary: ClassVar[str] = "dense"
    paper: ClassVar[str | None] = "1912.08795"
    ranks: ClassVar[bool] = False

    snapshots: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="dense images saved of a trajectory, at equal steps up to T",
    )

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        count = self.snapshots
        if count > iterations:
            raise SettingError(
                f"snapshots is {count}, but there are only {iterations} iterations; give at most "
                f"{iterations}."
            )
        return tuple(
            Event(round(k * iterations / count), patches, kept=True, stays=k < count)
            for k in range(1, count + 1)
        )
