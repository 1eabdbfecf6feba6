"""Uniform 8-bit quantizers of activations."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SCALE = 1e-30
"""Least distance of two levels, so that an input of zeros has a quantizer; products with weights
of up to 1e8 divided by it still fit in float32."""


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
