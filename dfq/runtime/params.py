"""What a kernel needs to know of a layer and of the output it shall write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfq.runtime.qtype import Quantizer
from dfq.runtime.weights import StoredWeight


@dataclass(frozen=True)
class LinearParams:
    """An integer linear layer ``y = (x - zero_point) @ weight.T * scales + bias``.

    ``weight_scale`` and ``bias`` are float32 ``[out]``; the input is uint8, and what it stands
    for is said by the quantizer ``input``.
    """

    weight: StoredWeight
    weight_scale: Tensor
    bias: Tensor
    input: Quantizer


@dataclass(frozen=True)
class OutputFormat:
    """How a linear layer's result is written.

    In units of ``scale``, one for all or one for each output, float32 ``[out]``.  ``dtype`` is
    float32 or bfloat16; or uint8, with a ``zero_point``, one scale and values up to ``qmax``; or
    int8, symmetric.  ``gelu`` is applied before (``none`` is the exact form, ``tanh`` its
    approximation), and then there is one scale.
    """

    dtype: torch.dtype = torch.float32
    scale: float | Tensor = 1.0
    zero_point: int = 0
    qmax: int = 255
    gelu: Literal["none", "tanh"] | None = None


@dataclass(frozen=True)
class Needs:
    """What decides whether kernels are exact for a layer.

    ``largest_weight`` is the largest magnitude that products multiply, 0 for attention;
    ``input_bits`` those of the other operand.
    """

    largest_weight: int = 127
    input_bits: int = 8
