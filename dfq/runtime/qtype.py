"""Types of integers, and what an integer stands for."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SCALE = 1e-30
"""Least distance of two levels, so that an input of zeros has a quantizer; products with weights
of up to 1e8 divided by it still fit in float32."""


@dataclass(frozen=True)
class QType:
    """Integers of 2 to 8 bits: ``0..2**bits - 1``, or signed.

    ``symmetric`` leaves out the lowest signed one, as in -127..127, whose zero point is 0.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        if not self.signed:
            return 0
        return -self.qmax if self.symmetric else -self.qmax - 1

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - self.signed)) - 1

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


UINT8 = QType(8)
INT8 = QType(8, signed=True, symmetric=True)


@dataclass(frozen=True)
class Quantizer:
    """A uniform quantizer: the integer ``i`` stands for ``(i - zero_point) * scale``."""

    scale: float
    zero_point: int = 0
    qtype: QType = UINT8

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that it can represent."""
        low, high = self.qtype.qmin, self.qtype.qmax
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


def quantizer_of(low: float, high: float, qtype: QType = UINT8) -> Quantizer:
    """The quantizer of a range: symmetric for signed integers, otherwise affine.

    As in torch.ao, an affine range is widened to contain 0.
    """
    if qtype.signed:
        return Quantizer(max(max(abs(low), abs(high)) / qtype.qmax, LEAST_SCALE), 0, qtype)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / qtype.qmax, LEAST_SCALE)
    return Quantizer(scale, min(qtype.qmax, max(0, round(-low / scale))), qtype)
