"""Integer weights as constants of an ONNX graph."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from onnx import TensorProto

from dfq.exporting.graph import Graph
from dfq.quantization.layers import IntegerLinear
from dfq.runtime.packing import pack_bits
from dfq.runtime.weights import expand_group_scale

WeightType = Literal["int8", "int4"]

SMALLEST_BLOCK = 16
"""Smallest block of 4-bit weights with one scale; smaller blocks hardly save space."""


def write_weight(graph: Graph, layer: IntegerLinear, kind: WeightType) -> str:
    """Write a weight ``[in, out]`` and its DequantizeLinear."""
    block = four_bit_block(layer) if kind == "int4" else None
    if block is not None:
        return _four_bits(graph, layer, block)
    constants = (
        graph.constant("weight", layer.integers().T),
        graph.constant("weight_scale", layer.weight_scale),
        graph.constant("weight_zero_point", np.zeros(layer.out_features, np.int8)),
    )
    return graph.op("DequantizeLinear", *constants, axis=1)


def four_bit_block(layer: IntegerLinear) -> int | None:
    """Return the block size of a 4-bit weight in a file; None if it must be widened to int8.

    OpenVINO requires blocks that divide the inputs, ONNX Runtime blocks of at least 16.
    """
    if layer.bits != 4:
        return None
    if not layer.group:
        return layer.in_features
    block = math.gcd(layer.group, layer.in_features)
    return block if block >= SMALLEST_BLOCK else None


def _four_bits(graph: Graph, layer: IntegerLinear, block: int) -> str:
    """Write 4-bit weights with a float scale per block of inputs and output."""
    integers = layer.stored.unpacked().T
    content = pack_bits(integers.reshape(1, -1), 4).numpy().tobytes()
    shape = (layer.in_features, layer.out_features)
    weight = graph.packed("weight", TensorProto.INT4, shape, content)
    if not layer.group:
        scale = graph.constant("weight_scale", layer.weight_scale)
        return graph.op("DequantizeLinear", weight, scale, axis=1)
    steps = layer.weight_scale[:, None] * layer.group_scale.float()
    steps = expand_group_scale(steps, layer.group, layer.in_features)[:, ::block]
    scale = graph.constant("weight_scale", steps.T)
    return graph.op("DequantizeLinear", weight, scale, axis=0, block_size=block)
