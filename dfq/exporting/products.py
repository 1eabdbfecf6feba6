"""The matrix products of a graph: in floating point, or between quantizers."""

from __future__ import annotations

import numpy as np
import torch

from dfq.exporting.forms import integer_layers
from dfq.exporting.graph import Graph
from dfq.exporting.transformer import softmax_of
from dfq.exporting.weights import WeightType, write_weight
from dfq.quantization.layers import IntegerPatchEmbed
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import ATTENTION_INPUTS
from dfq.runtime.qtype import INT8, QParams
from dfq.vit import ViT

SHARES = QParams(1 / 255)
"""Probabilities divided by the largest of their row, which is 1."""


class FloatProducts:
    """Of a float model."""

    def __init__(self, vit: ViT) -> None:
        self.vit = vit

    def images(self, _: Graph, x: str) -> str:
        return x

    def linear(self, graph: Graph, name: str, x: str) -> str:
        layer = self.vit.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        y = graph.op("MatMul", x, graph.constant("weight", layer.weight.T))
        return graph.op("Add", y, graph.constant("bias", layer.bias))

    def attention(
        self,
        graph: Graph,
        _: str,
        q: str,
        k: str,
        v: str,
        bias: str | None,
        scale: float,
    ) -> str:
        return write_attention(graph, q, k, v, bias, scale)


def write_attention(
    graph: Graph,
    q: str,
    k: str,
    v: str,
    bias: str | None,
    scale: float,
    sites: list[QParams] | None = None,
) -> str:
    """Both products of attention, in floating point or between the quantizers of q, k and v.

    As :func:`dfq.runtime.reference.attention`, each row of the quantized softmax has 255 as its
    largest integer and is divided by its sum after the second product.  The exponentials are
    written as a softmax over its row's largest entry: runtimes have kernels for softmax, and
    OpenVINO 2026.4 computes a difference, its exponential and a quantizer in a row wrongly.
    """
    with graph.part("scores"):
        q = graph.op("Mul", q, graph.scalar("scale", scale))
        if sites:
            scaled = QParams(sites[0].scale * scale, 0, INT8)
            q, k = rounded(graph, q, scaled, "q"), rounded(graph, k, sites[1], "k")
        scores = graph.op("MatMul", q, k)
    shares = softmax_of(graph, scores, bias)
    if not sites:
        with graph.part("values"):
            return graph.op("MatMul", shares, v)
    last = graph.constant("last", [-1])
    shares = graph.op("Div", shares, graph.op("ReduceMax", shares, last))
    shares = rounded(graph, shares, SHARES, "shares")
    with graph.part("values"):
        mixed = graph.op("MatMul", shares, rounded(graph, v, sites[2], "v"))
    return graph.op("Div", mixed, graph.op("ReduceSum", shares, last))


def rounded(graph: Graph, x: str, qparams: QParams, name: str = "input") -> str:
    """The values that quantized ``x`` stands for."""
    kind = np.int8 if qparams.qtype.signed else np.uint8
    constants = (
        graph.scalar(f"{name}_scale", qparams.scale),
        graph.constant(f"{name}_zero_point", np.array(qparams.zero_point, kind)),
    )
    if qparams.qtype.bits < 8:
        x = graph.op("Clip", x, *(graph.scalar(f"{name}_{end}", v) for end, v in _ends(qparams)))
    x = graph.op("QuantizeLinear", x, *constants)
    return graph.op("DequantizeLinear", x, *constants)


def _ends(qparams: QParams) -> tuple[tuple[str, float], ...]:
    low, high = qparams.range
    return ("low", low), ("high", high)


class QuantizedProducts(FloatProducts):
    """Of a quantized model, each input between QuantizeLinear and DequantizeLinear.

    Weights are int8 ``[in, out]`` with one scale a column; 4-bit ones are widened, or stay
    4-bit with ``weights="int4"``.
    """

    def __init__(self, model: QuantizedViT, weights: WeightType = "int8") -> None:
        super().__init__(model)
        self.layers, self.weights = integer_layers(model), weights
        self.qparams = model.activation_qparams()
        self.integer_attention = model.scheme.integer_attention

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
        return rounded(graph, x, layer.input_qparams)

    def linear(self, graph: Graph, name: str, x: str) -> str:
        layer = self.layers[name]
        if not isinstance(layer, IntegerPatchEmbed):
            x = rounded(graph, x, layer.input_qparams)
        y = graph.op("MatMul", x, write_weight(graph, layer, self.weights))
        return graph.op("Add", y, graph.constant("bias", layer.bias))

    def attention(
        self, graph: Graph, name: str, q: str, k: str, v: str, bias: str | None, scale: float
    ) -> str:
        if not self.integer_attention:
            return super().attention(graph, name, q, k, v, bias, scale)
        sites = [self.qparams[f"{name}.{site}"] for site in ATTENTION_INPUTS]
        return write_attention(graph, q, k, v, bias, scale, sites)


def integer_products(model: QuantizedViT) -> list[str]:
    """Names of the products that have quantizers on both sides."""
    names = list(integer_layers(model))
    if model.scheme.integer_attention:
        blocks = range(model.arch.depth)
        names += [f"blocks.{i}.attn.{p}" for i in blocks for p in ("scores", "values")]
    return [f"{name}/MatMul" for name in names]
