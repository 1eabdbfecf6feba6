"""Matrix products of an ONNX graph as TensorRT 11 documents explicit quantization.

Every quantizer is int8 with zero point 0: one scale for an input, one per output channel for a
weight.  Inputs of products are quantized, and neither their outputs, nor biases, nor the residual
stream, which layer norms read.  Networks are strongly typed, so what is to run in float16 is cast.
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from dfq.exporting.graph import Graph
from dfq.exporting.products import QuantizedProducts, write_attention, write_quantizers

PIXEL_SHIFT = 128 / 255
"""Pixels / 255 minus this are int8 integers times 1 / 255, with zero point 0."""


class TensorRTProducts(QuantizedProducts):
    """Writer of a model's matrix products for TensorRT; its activations are symmetric."""

    def images(self, graph: Graph, x: str) -> str:
        """Write the conversion of normalized images to pixels / 255 - :data:`PIXEL_SHIFT`; the
        patch embedding's bias takes the shift back."""
        return self.denormalized(graph, x, -PIXEL_SHIFT)

    def quantized_input(self, graph: Graph, name: str, x: str) -> str:
        return write_quantizers(graph, x, self.qparams[name].scale, np.zeros((), np.int8))

    def bias(self, name: str) -> torch.Tensor:
        bias = super().bias(name)
        if name != "patch_embed":
            return bias
        weight = self.layers[name].dequantized().double()
        return (bias.double() + weight.sum(1) * PIXEL_SHIFT).float()

    def attention(
        self, graph: Graph, _: str, q: str, k: str, v: str, bias: str | None, scale: float
    ) -> str:
        """Write attention in float16, for which TensorRT has fused kernels.

        Queries are scaled before the first product, in float32.
        """
        with graph.part("scores"):
            q = graph.op("Mul", q, graph.scalar("scale", scale))
        q, k, v = (_cast(graph, x, TensorProto.FLOAT16) for x in (q, k, v))
        bias = None if bias is None else _cast(graph, bias, TensorProto.FLOAT16)
        mixed = write_attention(graph, q, k, v, bias, None)
        return _cast(graph, mixed, TensorProto.FLOAT)


def _cast(graph: Graph, x: str, kind: int) -> str:
    return graph.op("Cast", x, to=kind)
