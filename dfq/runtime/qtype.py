"""Integer types and quantization parameters (qparams)."""

from __future__ import annotations

from dataclasses import dataclass

MIN_SCALE = 1e-30
"""Smallest quantization scale.  It gives an all-zero input valid qparams, and weights of up to 1e8
divided by it still fit in float32."""


@dataclass(frozen=True)
class QType:
    """Integer type of 2 to 8 bits: unsigned ``0..2**bits - 1``, or signed.

    ``symmetric`` excludes the lowest signed value: -127..127 instead of -128..127.
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
class QParams:
    """Parameters of a uniform quantizer: integer ``i`` represents ``(i - zero_point) * scale``."""

    scale: float
    zero_point: int = 0
    qtype: QType = UINT8

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest representable value."""
        low, high = self.qtype.qmin, self.qtype.qmax
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale

    @property
    def unsigned(self) -> QParams:
        """Qparams of the same values as unsigned integers: those of a signed type of ``b`` bits,
        -128..127 for 8, plus ``2 ** (b - 1)``."""
        if not self.qtype.signed:
            return self
        assert not self.qtype.symmetric
        return QParams(self.scale, self.zero_point - self.qtype.qmin, QType(self.qtype.bits))


def qparams_from_range(low: float, high: float, qtype: QType = UINT8) -> QParams:
    """Qparams of a range of values: symmetric for signed types, affine for unsigned ones.

    As in torch.ao, an affine range is widened to contain 0.
    """
    if qtype.signed:
        return QParams(max(max(abs(low), abs(high)) / qtype.qmax, MIN_SCALE), 0, qtype)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / qtype.qmax, MIN_SCALE)
    return QParams(scale, min(qtype.qmax, max(0, round(-low / scale))), qtype)
