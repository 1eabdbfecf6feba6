"""Integer linear layers through oneDNN, as PyTorch ships it for x86 processors."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.device import cpu_has
from dfq.runtime.params import LinearParams, OutputFormat

NAME = "onednn"


def available(device: torch.device) -> bool:
    """Whether products of uint8 and int8 are exact here, which takes VNNI.

    Without it oneDNN adds pairs of products in 16 bits, which saturate.
    """
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and cpu_has("vnni")


def prepack(params: LinearParams) -> object:
    """oneDNN's blocked copy of the weight, and its scales and zero points."""
    zero_points = torch.zeros(params.weight.shape[0], dtype=torch.int32)
    weight = torch.ops.onednn.qlinear_prepack(params.weight.contiguous(), None)
    return weight, params.weight_scale, zero_points, params.bias


def linear(x: Tensor, params: LinearParams, packed: object, out: OutputFormat) -> Tensor:
    """As :func:`dfq.runtime.reference.linear`."""
    assert isinstance(packed, tuple)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], params.weight.shape[0]), dtype=out.dtype)
    weight, scale, zero_points, bias = packed
    quantized = out.dtype == torch.uint8
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x,
        params.input_scale,
        params.input_zero_point,
        weight,
        scale,
        zero_points,
        bias,
        out.scale if quantized else 1.0,
        out.zero_point if quantized else 0,
        out.dtype,
        "none" if out.gelu is None else "gelu",
        [],
        "none" if out.gelu is None else out.gelu,
    )
    return y
