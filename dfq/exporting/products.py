"""The matrix products of a graph: in floating point, or between quantizers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from dfq.exporting.forms import integer_layers
from dfq.exporting.graph import Graph
from dfq.exporting.transformer import softmax_of
from dfq.quantization.layers import IntegerLinear, IntegerPatchEmbed
from dfq.quantization.model import QuantizedViT
from dfq.quantization.packing import pack_int4, unpack_int4
from dfq.quantization.quantizer import Quantizer
from dfq.vit import ViT

WeightType = Literal["int8", "int4"]


class FloatProducts:
    """Of a float model."""

    def __init__(self, vit: ViT) -> None:
        self.vit = vit

    def images(self, graph: Graph, x: str) -> str:  # noqa: ARG002
        return x

    def linear(self, graph: Graph, name: str, x: str) -> str:
        layer = self.vit.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        y = graph.op("MatMul", x, graph.constant("weight", layer.weight.T))
        return graph.op("Add", y, graph.constant("bias", layer.bias))

    def attention(
        self,
        graph: Graph,
        name: str,  # noqa: ARG002
        q: str,
        k: str,
        v: str,
        bias: str | None,
        scale: float,
    ) -> str:
        q = graph.op("Mul", q, graph.scalar("scale", scale))
        return graph.op("MatMul", softmax_of(graph, graph.op("MatMul", q, k), bias), v)


class QuantizedProducts(FloatProducts):
    """Of a quantized model, each input between QuantizeLinear and DequantizeLinear.

    Weights are int8 ``[in, out]`` with one scale a column; 4-bit ones are widened, or stay
    4-bit with ``weights="int4"``.
    """

    def __init__(self, model: QuantizedViT, weights: WeightType = "int8") -> None:
        super().__init__(model)
        self.layers, self.weights = integer_layers(model), weights
        self.quantizers = model.quantizers()
        self.integer_attention = model.settings.attention == "int8"

    def images(self, graph: Graph, x: str) -> str:
        """Pixels / 255 on the 256 levels that the patch embedding reads."""
        layer = self.layers["patch_embed"]
        assert isinstance(layer, IntegerPatchEmbed)
        grid = self.vit.arch.grid
        by_channel = (1, grid.channels, 1, 1)
        step = grid.patch_size[0] * grid.patch_size[1]
        std, mean = (c[::step].reshape(by_channel) for c in (layer.std, layer.mean))
        x = graph.op("Mul", x, graph.constant("std", std))
        x = graph.op("Add", x, graph.constant("mean", mean))
        return self.rounded(graph, x, layer.input_quantizer)

    def rounded(self, graph: Graph, x: str, quantizer: Quantizer) -> str:
        """The values that quantized ``x`` stands for."""
        kind = np.int8 if quantizer.signed else np.uint8
        constants = (
            graph.scalar("input_scale", quantizer.scale),
            graph.constant("input_zero_point", np.array(quantizer.zero_point, kind)),
        )
        x = graph.op("QuantizeLinear", x, *constants)
        return graph.op("DequantizeLinear", x, *constants)

    def linear(self, graph: Graph, name: str, x: str) -> str:
        layer = self.layers[name]
        if not isinstance(layer, IntegerPatchEmbed):
            x = self.rounded(graph, x, layer.input_quantizer)
        y = graph.op("MatMul", x, self.weight(graph, layer))
        return graph.op("Add", y, graph.constant("bias", layer.bias))

    def weight(self, graph: Graph, layer: IntegerLinear) -> str:
        """The dequantized weight ``[in, out]``."""
        if layer.bits == 4 and self.weights == "int4":
            return _four_bits(graph, layer)
        zeros = np.zeros(layer.out_features, np.int8)
        constants = (
            graph.constant("weight", layer.integers().T),
            graph.constant("weight_scale", layer.weight_scale),
            graph.constant("weight_zero_point", zeros),
        )
        return graph.op("DequantizeLinear", *constants, axis=1)

    def attention(
        self, graph: Graph, name: str, q: str, k: str, v: str, bias: str | None, scale: float
    ) -> str:
        if not self.integer_attention:
            return super().attention(graph, name, q, k, v, bias, scale)
        sites = [self.quantizers[f"{name}.attn.{s}"] for s in ("q", "k", "v", "probabilities")]
        q = graph.op("Mul", q, graph.scalar("scale", scale))
        scaled = Quantizer(sites[0].scale * scale, 0, signed=True)
        q, k, v = (
            self.rounded(graph, x, by)
            for x, by in ((q, scaled), (k, sites[1]), (v, sites[2]))
        )
        shares = softmax_of(graph, graph.op("MatMul", q, k), bias)
        return graph.op("MatMul", self.rounded(graph, shares, sites[3]), v)


def _four_bits(graph: Graph, layer: IntegerLinear) -> str:
    """4-bit weights with a float scale for each group of inputs of each column."""
    integers = unpack_int4(layer.weight, layer.in_features).T.contiguous()
    content = bytes(pack_int4(integers.reshape(1, -1)).numpy().tobytes())
    shape = (layer.in_features, layer.out_features)
    weight = graph.packed("weight", TensorProto.INT4, shape, content)
    if not layer.group:
        return graph.op("DequantizeLinear", weight, _scale(graph, layer.weight_scale), axis=1)
    scale = _scale(graph, (layer.weight_scale[:, None] * layer.group_scale.float()).T)
    return graph.op("DequantizeLinear", weight, scale, axis=0, block_size=layer.group)


def _scale(graph: Graph, value: Tensor) -> str:
    return graph.constant("weight_scale", value)
