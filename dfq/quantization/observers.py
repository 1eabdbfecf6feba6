"""Ranges through ``torch.ao.quantization.observer``; nothing else imports it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)

from dfq.quantization.quantizer import Quantizer
from dfq.recipe import Observer

OBSERVERS: dict[str, type[UniformQuantizationObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
}


def channel_scale(weight: Tensor, high: int) -> Tensor:
    """The scale of each output channel at which its largest magnitude becomes ``high``.

    Takes float32 ``[out, in]`` and gives float32 ``[out]``, above 0.
    """
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-high,
        quant_max=high,
    ).to(weight.device)
    observer(weight.detach())
    scale, _ = observer.calculate_qparams()
    return cast(Tensor, scale)


class RangeObserver:
    """Watches activations and gives their quantizer.

    Unsigned observers give affine uint8 quantizers, signed ones symmetric int8.
    """

    def __init__(self, kind: Observer, *, signed: bool = False) -> None:
        self.signed = signed
        low, high = (-127, 127) if signed else (0, 255)
        self._observer = OBSERVERS[kind](
            dtype=torch.int8 if signed else torch.uint8,
            qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
            quant_min=low,
            quant_max=high,
        )

    def observe(self, values: Tensor) -> None:
        """Take values of any shape into account."""
        if values.numel():
            self._observer(values.detach().float())

    def quantizer(self) -> Quantizer:
        """The quantizer of what was observed."""
        scale, zero_point = self._observer.calculate_qparams()
        return Quantizer(float(scale), int(zero_point), self.signed)
