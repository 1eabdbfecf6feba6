"""Quantized members of every family, and the demo, for tests of exports."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from families import FAMILIES, VARIANTS, Family
from torch import Tensor

import dfq
from dfq import demo
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.scheme import LayerScheme, Scheme
from dfq.recipe import QuantizationSettings
from dfq.runtime import reference
from dfq.runtime.qtype import INT8, QParams
from dfq.sparse import SparseImages, patchify
from dfq.vit import ViT
from dfq.vit.load import load_model

W8: dict[str, Any] = {"bits": 8, "attention": "float"}

MEMBERS = [pytest.param(f, id=f.name) for f in [*FAMILIES, *VARIANTS]]


LARGEST = 127
"""Largest 8-bit integer of q, k and v."""

STEP = 0.01


def _extremes() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 2, 8, 16), "k": (1, 2, 8, 16), "v": (1, 2, 8, 16)}
    signs = {n: torch.randint(0, 2, s, generator=generator) * 2.0 - 1 for n, s in shapes.items()}
    cases = {"positive": {n: torch.ones(s) for n, s in shapes.items()}, "both signs": signs}
    return {name: {n: x * LARGEST * STEP for n, x in case.items()} for name, case in cases.items()}


EXTREMES = _extremes()
"""Operands of attention ``[B, H, T, D]`` that are the largest integers, by what their signs are."""


def attention_bytes(operands: dict[str, Tensor]) -> bytes:
    """An ONNX file of 8-bit attention alone, with the operands' names as inputs."""
    import onnx
    from onnx import TensorProto, helper

    from dfq.exporting.graph import Graph
    from dfq.exporting.onnx_model import IR_VERSION, OPSET
    from dfq.exporting.products import write_attention

    graph, qparams = Graph(), [QParams(STEP, 0, INT8)] * 3
    with graph.part("attn"):
        k = graph.op("Transpose", "k", perm=[0, 1, 3, 2])
        output = write_attention(graph, "q", k, "v", None, _score_scale(operands), qparams)
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in operands.items()
    ]
    shape = operands["q"].shape
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
    constants = list(graph.constants.values())
    proto = helper.make_graph(graph.nodes, "attention", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _score_scale(operands: dict[str, Tensor]) -> float:
    return float(operands["q"].shape[-1]) ** -0.5


def reference_attention(operands: dict[str, Tensor]) -> Tensor:
    """8-bit attention of float operands by the reference arithmetic."""
    q, k, v = (reference.quantize(operands[n], QParams(STEP, 0, INT8)) for n in "qkv")
    return reference.attention(q, k, v, STEP * STEP * _score_scale(operands)) * STEP


def layer_scheme(bits: int, **settings: Any) -> LayerScheme:
    """Return the scheme of a block's layer for ``bits`` bits."""
    return Scheme(QuantizationSettings(bits=bits, **settings)).for_layer("blocks.0.attn.qkv")


@cache
def quantized(family: Family, *, bits: int, attention: Any, **changes: Any) -> QuantizedViT:
    """A member of a family, calibrated on random pixels, on the reference kernels."""
    settings = QuantizationSettings(bits=bits, attention=attention)
    return quantized_as(family, settings, **changes).set_backend("reference")


def quantized_as(family: Family, settings: QuantizationSettings, **changes: Any) -> QuantizedViT:
    """A member of a family, calibrated on random pixels."""
    module = family.make(**changes)
    channels = module.get_parameter("patch_embed.proj.weight").shape[1]
    loaded = load_model(module, mean=[0.4] * channels, std=[0.25] * channels)
    calibration = calibrate(
        loaded.vit, [_noise(loaded.vit)], loaded.preprocessing, Scheme(settings)
    )
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, settings)


def _noise(vit: ViT, count: int = 8) -> SparseImages:
    generator = torch.Generator().manual_seed(0)
    shape = (count, vit.arch.grid.patches, vit.arch.grid.patch_values)
    return _whole(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def _whole(patches: Tensor) -> SparseImages:
    """Return images with all their patches."""
    count, length, _ = patches.shape
    zeros = torch.zeros(count, dtype=torch.int64)
    positions = torch.arange(length).expand(count, -1)
    return SparseImages(patches, positions, zeros, zeros, torch.arange(count))


def images_for(vit: ViT, count: int = 8) -> Tensor:
    """Normalized images of random pixels."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, vit.arch.in_channels, *vit.arch.image_size)
    return (torch.randint(0, 256, shape, generator=generator) / 255 - 0.4) / 0.25


OPENVINO_FLOAT32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
"""Options of OpenVINO: float32 on one thread."""


def onnx_session(model: Path | bytes, optimized: Path | None = None) -> Any:
    """Open an ONNX model in ONNX Runtime on one thread; ``optimized``: file for its graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def spread(actual: Tensor, expected: Tensor) -> float:
    """Return the error relative to the spread of the expected values between images."""
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


@cache
def demo_images(count: int) -> Tensor:
    """The demo's first test images, normalized."""
    pixels = np.load(demo.TEST_SLICE)["x"][:count]
    return (torch.from_numpy(pixels)[:, None] / 255 - demo.MEAN[0]) / demo.STD[0]


@cache
def quantized_demo(bits: int, attention: Any) -> QuantizedViT:
    """The demo model, calibrated on its own test images."""
    loaded = load_model("demo")
    pixels = torch.from_numpy(np.load(demo.TEST_SLICE)["x"][-16:])[:, None]
    patches = patchify(pixels, loaded.vit.arch.grid)
    settings = QuantizationSettings(bits=bits, attention=attention)
    calibration = calibrate(loaded.vit, [_whole(patches)], loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, settings)


def checkpoint_of(
    path: Path,
    *,
    bits: int = 8,
    attention: str = "float",
    seed: int = 0,
    depth: int = 2,
    **quantization: Any,
) -> Path:
    """A checkpoint of the small ViT of conftest, calibrated on random noise."""
    dfq.quantize(
        make_vit(seed, depth=depth),
        bits=bits,
        attention=attention,
        calibration="noise",
        images=4,
        settings={"inversion": {"threads": 1}, "quantization": quantization},
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        out=path,
        cache=path.parent / "cache",
    )
    return path
