"""Models as OpenVINO's intermediate representation, read from our ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfq.device import multiplies_bfloat16
from dfq.extras import require

INTEGERS = ("i8", "u8")
MULTIPLYING = ("FullyConnected", "MatMul", "Subgraph")
WANTED = ("layerType", "runtimePrecision", "originalLayersNames")
FACTS = "dfq"
TAIL = 1 << 16
"""The facts of an .xml are at its end."""


def read_model(openvino: Any, content: bytes) -> Any:
    """An OpenVINO model from ONNX."""
    import numpy as np

    no_weights = openvino.Tensor(np.zeros(0, np.uint8))
    return openvino.Core().read_model(content, no_weights)


def compile_model(openvino: Any, model: Any, threads: int | None = None) -> Any:
    """The model (or the path of an .xml) ready to run on the processor, from OpenVINO's
    defaults: floating point may be bfloat16 where the processor multiplies it."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if not multiplies_bfloat16(torch.device("cpu")):
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return openvino.Core().compile_model(model, "CPU", options)


def save_ir(content: bytes, facts: dict[str, str], path: Path) -> None:
    """Write ``path`` (.xml) and the .bin beside it from ONNX.

    Raises:
        ExtraError: OpenVINO is not installed.
    """
    openvino = require("openvino", "openvino")
    model = read_model(openvino, content)
    for name, value in facts.items():
        model.set_rt_info(value, [FACTS, name])
    openvino.save_model(model, path, compress_to_fp16=False)


def integers_in(compiled: Any, products: Sequence[str]) -> list[str]:
    """Those of the named products that the compiled model runs on 8-bit integers."""
    found: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        info = {k: node.get_rt_info()[k].astype(str) for k in WANTED}
        if info["layerType"] in MULTIPLYING and info["runtimePrecision"] in INTEGERS:
            found.update(info["originalLayersNames"].split(","))
    parts = (f"{product}/Dequantization" for product in products)
    return [
        product
        for product, part in zip(products, parts, strict=True)
        if any(name == product or name.startswith(part) for name in found)
    ]


def is_export(path: Path) -> bool:
    """Whether a file is an .xml that dfq wrote."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return f"<{FACTS}>".encode() in file.read()
    except OSError:
        return False
