"""What a kernel needs to know of a layer and of the output it shall write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearParams:
    """An integer linear layer ``y = (x - zero_point) @ weight.T * scales + bias``.

    ``weight`` int8 ``[out, in]``, ``weight_scale`` and ``bias`` float32 ``[out]``; the
    input is uint8 and stands for ``(x - input_zero_point) * input_scale``.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: float
    input_zero_point: int


@dataclass(frozen=True)
class OutputFormat:
    """How a linear layer's result is written.

    In units of ``scale``, one for all or one for each output, float32 ``[out]``.  ``dtype`` is
    float32 or bfloat16; or uint8, with a ``zero_point`` and one scale; or int8, symmetric.
    ``gelu`` is applied before (``none`` is the exact form, ``tanh`` its approximation), and
    then there is one scale.
    """

    dtype: torch.dtype = torch.float32
    scale: float | Tensor = 1.0
    zero_point: int = 0
    gelu: Literal["none", "tanh"] | None = None
