"""Export to ONNX."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from dfq._version import __version__
from dfq.argument_names import option
from dfq.errors import UnsupportedModelError
from dfq.exporting.graph import Graph
from dfq.exporting.transformer import IMAGES, Products, Transformer
from dfq.vit import ViT

OPSET, IR_VERSION = 21, 10
"""First operator set with blockwise 4-bit weights; it also has Gelu and LayerNormalization."""

PRODUCER = "dfq"

LIMIT = 2**31 - 2**20
"""Largest size of all constants in bytes; protobuf is limited to 2 GiB."""


def onnx_bytes(vit: ViT, products: Products, facts: dict[str, str] | None = None) -> bytes:
    """Return a checked ONNX file: ``images`` float32 ``[N, C, H, W]``, normalized, to ``logits``
    ``[N, num_classes]``, or ``features`` ``[N, embed_dim]`` without a classifier.

    Raises:
        UnsupportedModelError: the model is too large for one file.
    """
    arch, graph = vit.arch, Graph()
    output = "logits" if arch.num_classes else "features"
    Transformer(graph, vit, products).write(output)
    if graph.size > LIMIT:
        raise UnsupportedModelError(
            f"The model has {graph.size / 1e9:.1f} GB of constants; an ONNX file ends at 2 GB. "
            f"A torch program ({option('format', 'torch')}) has no such limit."
        )
    width = arch.num_classes or arch.embed_dim
    proto = helper.make_graph(
        graph.nodes,
        "vit",
        [_value(IMAGES, "N", arch.in_channels, *arch.image_size)],
        [_value(output, "N", width)],
        list(graph.constants.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name, model.producer_version = PRODUCER, __version__
    helper.set_model_props(model, facts or {})
    content: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(content, full_check=True)
    return content


DECODE_ERROR: type[Exception] = import_module("google.protobuf.message").DecodeError


def _value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def is_export(path: Path) -> bool:
    """Whether a file is an ONNX model that dfq wrote."""
    try:
        return bool(onnx.load_model(path, load_external_data=False).producer_name == PRODUCER)
    except (DECODE_ERROR, OSError):
        return False
