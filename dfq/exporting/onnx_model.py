"""Models as ONNX."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from dfq import __version__
from dfq.exporting.graph import Graph
from dfq.exporting.transformer import IMAGES, Products, Transformer
from dfq.vit import ViT

OPSET, IR_VERSION = 21, 10
PRODUCER = "dfq"


def onnx_model(vit: ViT, products: Products, facts: dict[str, str] | None = None) -> Any:
    arch = vit.arch
    graph = Graph()
    output = "logits" if arch.num_classes else "features"
    Transformer(graph, vit, products).write(output)
    inputs = ["N", arch.in_channels, *arch.image_size]
    proto = helper.make_graph(
        graph.nodes,
        "vit",
        [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", arch.num_classes or arch.embed_dim])],
        list(graph.constants.values()),
    )
    model = helper.make_model(
        proto,
        producer_name=PRODUCER,
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, facts or {})
    return model
