"""Activation observers, most of them from ``torch.ao.quantization.observer``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    UniformQuantizationObserverBase,
)

from dfq.errors import SettingError, nearest
from dfq.quantization.histogram import Histogram
from dfq.recipe import Observer
from dfq.runtime.qtype import MIN_SCALE, UINT8, QParams, QType, qparams_from_range

TORCH: dict[Observer, type[UniformQuantizationObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
}
"""Observers of PyTorch."""

OURS: dict[Observer, Callable[[Histogram, QType], tuple[float, float]]] = {
    "percentile": lambda histogram, _: histogram.percentile(),
    "mse": Histogram.least_error,
}
"""Ranges from a histogram of all values."""


class RangeObserver:
    """Observer of one activation that calculates its qparams.

    Unsigned types get affine qparams; signed types symmetric ones, whose largest integer stands
    for the largest magnitude.  Memory is constant.

    Raises:
        SettingError: no observer has the name ``kind``.
    """

    def __init__(self, kind: Observer, qtype: QType = UINT8) -> None:
        if kind not in (names := (*TORCH, *OURS)):
            raise SettingError(
                f"observer is {kind!r}; allowed: {', '.join(names)}.{nearest(kind, names)}"
            )
        self.kind, self.qtype = kind, qtype
        self._histogram = Histogram() if kind in OURS else None
        self._observer = TORCH.get(kind, MinMaxObserver)(
            dtype=torch.int8 if qtype.signed else torch.uint8,
            qscheme=torch.per_tensor_symmetric if qtype.signed else torch.per_tensor_affine,
            quant_min=-qtype.qmax if qtype.signed else qtype.qmin,
            quant_max=qtype.qmax,
            eps=MIN_SCALE,
        )

    def observe(self, values: Tensor) -> None:
        """Observe values of any shape."""
        if self._histogram is not None:
            self._histogram.observe(values)
        elif values.numel():
            self._observer(values.detach().float())

    def calculate_qparams(self) -> QParams:
        """Calculate the qparams from the values observed."""
        if self._histogram is not None:
            return qparams_from_range(*OURS[self.kind](self._histogram, self.qtype), self.qtype)
        scale, zero_point = self._observer.calculate_qparams()
        return QParams(float(scale), int(zero_point), self.qtype)
