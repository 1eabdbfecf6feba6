"""Types of integers that weights are rounded to."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_GROUP_SCALE = 16
"""Largest integer scale of a group: 4-bit integers times it still fit in 8 bits."""


@dataclass(frozen=True)
class WeightType:
    """Signed integers of 4 or 8 bits; the zero point is 0.

    ``reduce_range`` keeps what a product multiplies within -64..63.  x86 processors without
    VNNI add two products of uint8 and int8 in 16 bits, which saturate beyond
    ``2 * 255 * 64 < 2 ** 15``.  The name is that of PyTorch and ONNX Runtime.
    """

    bits: int
    reduce_range: bool = False

    @property
    def qmin(self) -> int:
        """Smallest integer: -8 of 4 bits; 8 bits are symmetric."""
        return -8 if self.bits == 4 else -self.qmax

    @property
    def qmax(self) -> int:
        """Largest integer: 7 of 4 bits, 127 or 63 of 8."""
        if self.bits == 4:
            return 7
        return 63 if self.reduce_range else 127

    @property
    def largest_group_scale(self) -> int:
        """Largest integer scale of a group of 4-bit integers."""
        return LARGEST_GROUP_SCALE // 2 if self.reduce_range else LARGEST_GROUP_SCALE

    @property
    def smallest_clip(self) -> float:
        """Least share of the largest magnitude that a search for the scale tries."""
        return 0.5 if self.bits == 4 else 0.9
