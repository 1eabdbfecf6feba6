"""Ranges through ``torch.ao.quantization.observer``; nothing else imports it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    UniformQuantizationObserverBase,
)

from dfq.quantization.histogram import Histogram, quantizer_of
from dfq.quantization.quantizer import LEAST_SCALE, Quantizer
from dfq.recipe import Observer

OBSERVERS: dict[str, type[UniformQuantizationObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
}


class RangeObserver:
    """Watches activations and gives their quantizer.

    Unsigned observers give affine uint8 quantizers, signed ones symmetric int8.  Memory does
    not grow with what is observed.
    """

    def __init__(self, kind: Observer, *, signed: bool = False) -> None:
        self.kind, self.signed = kind, signed
        low, high = (-127, 127) if signed else (0, 255)
        self._histogram = Histogram() if kind not in OBSERVERS else None
        self._observer = OBSERVERS.get(kind, MinMaxObserver)(
            dtype=torch.int8 if signed else torch.uint8,
            qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
            quant_min=low,
            quant_max=high,
            eps=LEAST_SCALE,
        )

    def observe(self, values: Tensor) -> None:
        """Take values of any shape into account."""
        if self._histogram is not None:
            self._histogram.observe(values)
        elif values.numel():
            self._observer(values.detach().float())

    def quantizer(self) -> Quantizer:
        """The quantizer of what was observed."""
        if self._histogram is not None:
            found = self._histogram
            span = found.percentile() if self.kind == "percentile" else None
            return quantizer_of(*(span or found.least_error(self.signed)), self.signed)
        scale, zero_point = self._observer.calculate_qparams()
        return Quantizer(float(scale), int(zero_point), self.signed)
