"""Export to OpenVINO IR, by way of ONNX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfq.device import multiplies_bfloat16
from dfq.extras import require
from dfq.files import sha256

INTEGERS = ("i8", "u8")
MULTIPLYING = ("FullyConnected", "MatMul", "Subgraph")
WANTED = ("layerType", "runtimePrecision", "originalLayersNames")
FACTS, BESIDE = "dfq", ".bin"
WEIGHTS_DIGEST = re.compile(rb'<weights_sha256 value="([0-9a-f]{64})"')
TAIL = 1 << 16
"""Bytes at the end of an .xml that hold the metadata."""


def read_model(openvino: Any, content: bytes) -> Any:
    """Read an ONNX model with OpenVINO."""
    import numpy as np

    no_weights = openvino.Tensor(np.zeros(0, np.uint8))
    return openvino.Core().read_model(content, no_weights)


def compile_model(openvino: Any, model: Any, threads: int | None = None) -> Any:
    """Compile a model (or the path of an .xml) for the CPU with OpenVINO's defaults.

    Floating-point operations may use bfloat16 where it is native.
    """
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if not multiplies_bfloat16(torch.device("cpu")):
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return openvino.Core().compile_model(model, "CPU", options)


def save_ir(content: bytes, facts: dict[str, str], path: Path) -> None:
    """Write ``path`` (.xml) and the .bin beside it, whose SHA-256 it records, from ONNX.

    Raises:
        ExtraError: OpenVINO is not installed.
    """
    openvino = require("openvino", "openvino")
    model = read_model(openvino, content)
    for name, value in facts.items():
        model.set_rt_info(value, [FACTS, name])
    openvino.save_model(model, path, compress_to_fp16=False)
    model.set_rt_info(sha256(path.with_suffix(BESIDE)).hexdigest(), [FACTS, "weights_sha256"])
    openvino.save_model(model, path, compress_to_fp16=False)


def integers_in(compiled: Any, products: Sequence[str]) -> list[str]:
    """Return those of the named products that a compiled model runs on 8-bit integers."""
    integer_nodes: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        info = {k: node.get_rt_info()[k].astype(str) for k in WANTED}
        if info["layerType"] in MULTIPLYING and info["runtimePrecision"] in INTEGERS:
            integer_nodes.update(info["originalLayersNames"].split(","))
    parts = (f"{product}/Dequantization" for product in products)
    return [
        product
        for product, part in zip(products, parts, strict=True)
        if any(name == product or name.startswith(part) for name in integer_nodes)
    ]


def is_export(path: Path) -> bool:
    """Whether an .xml was written by dfq, and the .bin beside it, if there is one, with it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            tail = file.read()
        digest, beside = WEIGHTS_DIGEST.search(tail), path.with_suffix(BESIDE)
        if f"<{FACTS}>".encode() not in tail or digest is None:
            return False
        return not beside.exists() or sha256(beside).hexdigest().encode() == digest[1]
    except OSError:
        return False
