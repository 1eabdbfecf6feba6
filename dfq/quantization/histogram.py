"""Histogram observer for the ranges that torch.ao lacks: percentile and least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.runtime.qtype import MIN_SCALE, QType, qparams_from_range

BINS = 4096
"""Even, so that halves merge in pairs when the range doubles."""

TAIL = 1e-5
"""Share of values that the percentile range clips on each side."""

CLIP_STEPS = 80
"""Candidate ranges of the clipping search, from the full range down to a fifth of it."""


class Histogram:
    """Counts of values in ``BINS`` bins over ``-limit..limit``; ``limit`` doubles when exceeded.

    Memory is constant.  The order of observations matters only through the first ``limit``.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def observe(self, values: Tensor) -> None:
        """Count float values of any shape."""
        values = values.detach().float().flatten()
        if not values.numel():
            return
        self._extend(float(values.abs().max()))
        counts = torch.histc(values, BINS, -self.limit, self.limit)
        self.counts += counts.double().cpu()

    def _extend(self, largest: float) -> None:
        self.limit = self.limit or max(largest, MIN_SCALE)
        while self.limit < largest:
            self.limit *= 2
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[BINS // 4 : 3 * BINS // 4] = merged

    @property
    def bin_centers(self) -> Tensor:
        """Center of each bin, float64 ``[BINS]``."""
        width = 2 * self.limit / BINS
        return -self.limit + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def min_max(self) -> tuple[float, float]:
        """Return the outer edges of the lowest and the highest nonempty bin."""
        return self._edges(0.0)

    def percentile(self) -> tuple[float, float]:
        """Return the range that clips a share of :data:`TAIL` of the values on each side."""
        return self._edges(TAIL)

    def _edges(self, tail: float) -> tuple[float, float]:
        below = self.counts.cumsum(0)
        total, width = float(below[-1]), 2 * self.limit / BINS
        first = int((below > tail * total).nonzero()[0])
        last = int((below < total * (1 - tail)).sum())
        return -self.limit + width * first, -self.limit + width * (min(last, BINS - 1) + 1)

    def least_error(self, qtype: QType) -> tuple[float, float]:
        """Return the range of least mean squared error among shrunk copies of :meth:`min_max`."""
        low, high = self.min_max()
        best, least = (low, high), float("inf")
        for share in torch.linspace(1, 0.2, CLIP_STEPS, dtype=torch.float64).tolist():
            qparams = qparams_from_range(low * share, high * share, qtype)
            low_end, high_end = qparams.range
            levels = (self.bin_centers / qparams.scale).round() * qparams.scale
            error = (levels.clamp(low_end, high_end) - self.bin_centers).square() @ self.counts
            if float(error) < least:
                best, least = (low * share, high * share), float(error)
        return best
