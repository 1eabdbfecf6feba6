"""Sparse Model Inversion: unimportant patches are discarded early."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dfq.errors import SettingError
from dfq.inversion.schedules.method import Event, Method
from dfq.validation import Shares, settings


@settings
class Smi(Method):
    """Sparse Model Inversion (arXiv 2510.27186): at four early iterations 30 % of the live
    patches are dropped, the least important ones; the others are the image."""

    name: ClassVar[str] = "smi"
    summary: ClassVar[str] = "sparse, discarding"
    paper: ClassVar[str | None] = "2510.27186"

    prune_at: Shares = Field(
        default=(0.0125, 0.025, 0.05, 0.075),
        description="when patches are dropped, as shares of T",
    )
    prune_share: float = Field(
        default=0.3, ge=0.0, le=0.99, description="share of the live patches dropped each time"
    )

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        dropped: list[Event] = []
        for share in sorted(self.prune_at):
            count = round(patches * self.prune_share)
            patches -= count
            if count:
                at = min(iterations, max(1, round(share * iterations)))
                dropped.append(Event(at, count, kept=False))
        if patches < 1:
            raise SettingError(
                f"prune_share {self.prune_share} at {self.prune_at} leaves no patch."
            )
        return (*dropped, Event(iterations, patches, kept=True))
