"""Ranges from a histogram, where torch.ao has no observer: percentiles, least square error."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.runtime.qtype import MIN_SCALE, QType, qparams_from_range

BINS = 4096
"""Even, so that halves merge in pairs when the range doubles."""

TAIL = 1e-5
"""Share of values that the percentile range leaves outside, on each side."""

SHRINKS = 80
"""Candidates of the search, from the full range down to a fifth of it."""


class Histogram:
    """Counts of values in ``BINS`` bins over a symmetric range that doubles when it must.

    Memory does not grow with what is observed, and the order of observations does not
    matter but for the first range.
    """

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def observe(self, values: Tensor) -> None:
        """Take float values of any shape into account."""
        values = values.detach().float().flatten()
        if not values.numel():
            return
        self._extend(float(values.abs().max()))
        counts = torch.histc(values, BINS, -self.reach, self.reach)
        self.counts += counts.double().cpu()

    def _extend(self, largest: float) -> None:
        self.reach = self.reach or max(largest, MIN_SCALE)
        while self.reach < largest:
            self.reach *= 2
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[BINS // 4 : 3 * BINS // 4] = merged

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, float64."""
        width = 2 * self.reach / BINS
        return -self.reach + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def occupied(self) -> tuple[float, float]:
        """Outer edges of the lowest and the highest bin that is not empty."""
        return self._edges(0.0)

    def percentile(self) -> tuple[float, float]:
        """The range that leaves a share of :data:`TAIL` outside at either end."""
        return self._edges(TAIL)

    def _edges(self, tail: float) -> tuple[float, float]:
        below = self.counts.cumsum(0)
        total, width = float(below[-1]), 2 * self.reach / BINS
        first = int((below > tail * total).nonzero()[0])
        last = int((below < total * (1 - tail)).sum())
        return -self.reach + width * first, -self.reach + width * (min(last, BINS - 1) + 1)

    def least_error(self, qtype: QType) -> tuple[float, float]:
        """The range, a shrunk form of the occupied one, of least mean square error."""
        low, high = self.occupied()
        best, least = (low, high), float("inf")
        for share in torch.linspace(1, 0.2, SHRINKS, dtype=torch.float64).tolist():
            quantizer = qparams_from_range(low * share, high * share, qtype)
            low_end, high_end = quantizer.range
            levels = (self.centres / quantizer.scale).round() * quantizer.scale
            error = (levels.clamp(low_end, high_end) - self.centres).square() @ self.counts
            if float(error) < least:
                best, least = (low * share, high * share), float(error)
        return best
