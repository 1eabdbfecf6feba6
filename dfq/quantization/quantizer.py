"""Uniform 8-bit quantizers of activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantizer:
    """A uniform quantizer: the integer ``i`` stands for ``(i - zero_point) * scale``.

    Signed quantizers are symmetric, -127..127 with zero point 0; the others span 0..255.
    """

    scale: float
    zero_point: int
    signed: bool

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that it can represent."""
        low, high = (-127, 127) if self.signed else (0, 255)
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale
