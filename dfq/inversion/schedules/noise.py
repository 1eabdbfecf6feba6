"""Gaussian noise: the start of every other method, as a control."""

from __future__ import annotations

from typing import ClassVar

from dfq.inversion.schedules.method import Event, Method
from dfq.validation import settings


@settings
class Noise(Method):
    """Gaussian noise within the bounds of pixels, whole images without any optimization."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "no optimization"
    optimizes: ClassVar[bool] = False
    ranks: ClassVar[bool] = False

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        del iterations
        return (Event(0, patches, kept=True),)
