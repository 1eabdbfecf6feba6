"""Matrix products of an ONNX graph, in floating point or with quantized inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfq.exporting.forms import integer_layers
from dfq.exporting.graph import Graph
from dfq.exporting.transformer import softmax_of
from dfq.exporting.weights import WeightType, write_weight
from dfq.quantization.layers import IntegerPatchEmbed
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import ATTENTION_INPUTS
from dfq.runtime.qtype import INT8, UINT8, QParams
from dfq.vit import ViT

SOFTMAX_QPARAMS = QParams(1 / 255)
"""Qparams of softmax probabilities divided by the largest of their row."""


class FloatProducts:
    """Writer of a float model's matrix products."""

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
    scale: float | None,
    qparams: list[QParams] | None = None,
) -> str:
    """Write both products of attention, in floating point or with the qparams of q, k and v.

    ``scale`` multiplies the scores; None if queries are scaled already.

    As :func:`dfq.runtime.reference.attention`, each row of the quantized softmax has 255 as its
    largest integer and is divided by its sum after the second product.  The exponentials are
    written as a softmax over its row's largest entry: runtimes have kernels for softmax, and
    OpenVINO 2026.4 computes a difference, its exponential and a quantizer in a row wrongly.
    """
    with graph.part("scores"):
        if scale is not None:
            q = graph.op("Mul", q, graph.scalar("scale", scale))
        if qparams:
            assert scale is not None
            scaled = QParams(qparams[0].scale * scale, 0, INT8)
            q, k = fake_quantize(graph, q, scaled, "q"), fake_quantize(graph, k, qparams[1], "k")
        scores = graph.op("MatMul", q, k)
    probabilities = softmax_of(graph, scores, bias)
    if not qparams:
        with graph.part("values"):
            return graph.op("MatMul", probabilities, v)
    last = graph.constant("last", [-1])
    probabilities = graph.op("Div", probabilities, graph.op("ReduceMax", probabilities, last))
    probabilities = fake_quantize(graph, probabilities, SOFTMAX_QPARAMS, "shares")
    with graph.part("values"):
        mixed = graph.op("MatMul", probabilities, fake_quantize(graph, v, qparams[2], "v"))
    return graph.op("Div", mixed, graph.op("ReduceSum", probabilities, last))


def fake_quantize(graph: Graph, x: str, qparams: QParams, name: str = "input") -> str:
    """Write QuantizeLinear and DequantizeLinear of ``x``, clipped where uint8 holds more levels.

    Signed integers are written as uint8 above their lowest value, which then is 0.  Where both
    inputs of a product are such, it is exact on every processor: ONNX Runtime multiplies uint8 by
    uint8 without saturation, and OpenVINO, whose second operand has to be int8, multiplies in
    floating point, as -127..128 does not fit.
    """
    qtype, lowest = qparams.qtype, qparams.qtype.qmin
    if qtype.qmax - lowest < UINT8.qmax:
        ends = zip(("low", "high"), qparams.range, strict=True)
        x = graph.op("Clip", x, *(graph.scalar(f"{name}_{end}", v) for end, v in ends))
    zero_point = np.array(qparams.zero_point - lowest, np.uint8)
    return write_quantizers(graph, x, qparams.scale, zero_point, name)


def write_quantizers(
    graph: Graph, x: str, scale: float, zero_point: NDArray[Any], name: str = "input"
) -> str:
    """Write QuantizeLinear and DequantizeLinear of ``x``; ``zero_point`` has the integers' type."""
    constants = (
        graph.scalar(f"{name}_scale", scale),
        graph.constant(f"{name}_zero_point", zero_point),
    )
    x = graph.op("QuantizeLinear", x, *constants)
    return graph.op("DequantizeLinear", x, *constants)


class QuantizedProducts(FloatProducts):
    """Writer of a quantized model's matrix products, with QuantizeLinear and DequantizeLinear.

    Weights are int8 ``[in, out]`` with one scale per output; 4-bit weights are widened to int8, or
    stay 4-bit with ``weights="int4"``.
    """

    def __init__(self, model: QuantizedViT, weights: WeightType = "int8") -> None:
        super().__init__(model)
        self.layers, self.weights = integer_layers(model), weights
        self.qparams = model.activation_qparams()
        self.integer_attention = model.scheme.integer_attention

    def images(self, graph: Graph, x: str) -> str:
        """Write the conversion of normalized images to pixels / 255, rounded to 256 levels."""
        x = self.denormalized(graph, x)
        return fake_quantize(graph, x, self.layers["patch_embed"].input_qparams)

    def denormalized(self, graph: Graph, x: str, shift: float = 0.0) -> str:
        """Write the conversion of normalized images to pixels / 255, plus ``shift``."""
        layer = self.layers["patch_embed"]
        assert isinstance(layer, IntegerPatchEmbed)
        grid = self.vit.arch.grid
        by_channel = (1, grid.channels, 1, 1)
        step = grid.patch_size[0] * grid.patch_size[1]
        std, mean = (c[::step].reshape(by_channel) for c in (layer.std, layer.mean))
        x = graph.op("Mul", x, graph.constant("std", std))
        return graph.op("Add", x, graph.constant("mean", mean + shift))

    def quantized_input(self, graph: Graph, name: str, x: str) -> str:
        """Write the quantizers of a layer's input, if it has not passed them in :meth:`images`."""
        return x if name == "patch_embed" else fake_quantize(graph, x, self.qparams[name])

    def bias(self, name: str) -> torch.Tensor:
        """Return a layer's bias, float32 ``[out]``."""
        return self.layers[name].bias

    def linear(self, graph: Graph, name: str, x: str) -> str:
        x = self.quantized_input(graph, name, x)
        y = graph.op("MatMul", x, write_weight(graph, self.layers[name], self.weights))
        return graph.op("Add", y, graph.constant("bias", self.bias(name)))

    def attention(
        self, graph: Graph, name: str, q: str, k: str, v: str, bias: str | None, scale: float
    ) -> str:
        if not self.integer_attention:
            return super().attention(graph, name, q, k, v, bias, scale)
        qparams = [self.qparams[f"{name}.{suffix}"] for suffix in ATTENTION_INPUTS]
        return write_attention(graph, q, k, v, bias, scale, qparams)


def integer_products(model: QuantizedViT) -> list[str]:
    """Return the names of the matrix products with two quantized inputs."""
    names = list(integer_layers(model))
    if model.scheme.integer_attention:
        blocks = range(model.arch.depth)
        names += [f"blocks.{i}.attn.{p}" for i in blocks for p in ("scores", "values")]
    return [f"{name}/MatMul" for name in names]
