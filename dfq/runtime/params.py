"""Parameters of integer kernels: layers, output formats, requirements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfq.runtime.qtype import QParams
from dfq.runtime.weights import StoredWeight


@dataclass(frozen=True)
class LinearParams:
    """Parameters of an integer linear layer ``y = (x - zero_point) @ weight.T * scales + bias``.

    ``weight_scale`` and ``bias`` are float32 ``[out]``; ``input`` holds the qparams of the uint8
    input.
    """

    weight: StoredWeight
    weight_scale: Tensor
    bias: Tensor
    input: QParams


@dataclass(frozen=True)
class OutputFormat:
    """Output format of an integer linear layer.

    Outputs are divided by ``scale``: a number, or one per output, float32 ``[out]``.  ``dtype``:
    float32 or bfloat16; uint8, with one scale, a ``zero_point`` and values up to ``qmax``; or int8,
    symmetric.  ``gelu`` is applied before quantization (``none``: the exact form, ``tanh``: its
    approximation) and requires one scale.
    """

    dtype: torch.dtype = torch.float32
    scale: float | Tensor = 1.0
    zero_point: int = 0
    qmax: int = 255
    gelu: Literal["none", "tanh"] | None = None


@dataclass(frozen=True)
class KernelRequirements:
    """Operand ranges for which a kernel must be exact.

    ``max_weight`` is the largest magnitude of the integer weights, 0 for attention; ``input_bits``
    is the bit width of the other operand.  ``inputs`` and ``outputs`` of a layer decide which
    kernel is faster; None of layers in general.
    """

    max_weight: int = 127
    input_bits: int = 8
    inputs: int | None = None
    outputs: int | None = None
