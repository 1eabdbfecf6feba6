"""The runtimes that are compared, each as a function of images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfq.exporting.forms import dequantized
from dfq.extras import require
from dfq.quantization.model import QuantizedViT
from dfq.sparse import images_to_input
from dfq.vit import ViT

Run = Callable[[], Any]
"""One inference of a fixed batch."""

CALIBRATION_IMAGES = 8
"""Random images on which other tools' quantization is calibrated; only its speed counts."""

TRIALS = 3


@dataclass(frozen=True)
class Contestants:
    """What every runtime is built from.

    ``directory`` is for files that a tool needs; ``threads`` what each may use.
    """

    model: QuantizedViT
    threads: int
    directory: Path

    @cached_property
    def float_model(self) -> ViT:
        """The checkpoint's dequantized weights in float32."""
        return dequantized(self.model)

    @cached_property
    def float_onnx(self) -> bytes:
        from dfq.exporting.onnx_model import onnx_bytes
        from dfq.exporting.products import FloatProducts

        return onnx_bytes(self.float_model, FloatProducts(self.float_model))

    @cached_property
    def quantized_onnx(self) -> bytes:
        from dfq.exporting.onnx_model import onnx_bytes
        from dfq.exporting.products import QuantizedProducts

        return onnx_bytes(self.model, QuantizedProducts(self.model))

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Random pixels, normalized: float32 ``[count, C, H, W]``."""
        arch, prepared = self.model.arch, self.model.preprocessing
        generator = torch.Generator().manual_seed(seed)
        shape = (count, arch.in_channels, *arch.image_size)
        return images_to_input(torch.randint(0, 256, shape, generator=generator), prepared)


Predict = Callable[[Tensor], Any]
"""A runtime that is ready: normalized images to logits."""


def _dfq(given: Contestants) -> Predict:
    return given.model


def _dfq_compiled(given: Contestants) -> Predict:
    model = copy.deepcopy(given.model)
    model.compile()
    return model


def _torch_fp32(given: Contestants) -> Predict:
    return _inference(given.float_model)


def _inference(vit: ViT) -> Predict:
    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = vit(images)
            return logits

    return predict


class _Fused(torch.nn.Module):
    """PyTorch's fused attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)


def _torch_bf16(given: Contestants) -> Predict:
    """The faster of attention written out and fused, which depends on the processor."""
    forms = []
    for fused in (False, True):
        vit = dequantized(given.model).bfloat16()
        for index in range(vit.arch.depth if fused else 0):
            vit.block(index).attn.product = _Fused()
        forms.append(_rounded(_inference(vit)))
    images = given.images(1)
    return min(forms, key=lambda form: _fastest(lambda: form(images)))


def _rounded(predict: Predict) -> Predict:
    return lambda images: predict(images.bfloat16())


def _fastest(run: Run) -> float:
    run()
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _session(given: Contestants, model: bytes | str) -> Predict:
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = given.threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _onnxruntime_dfq(given: Contestants) -> Predict:
    return _session(given, given.quantized_onnx)


def _onnxruntime_int8(given: Contestants) -> Predict:
    """ONNX Runtime's static quantization of all operators that it knows, weights per channel."""
    tools = require("onnxruntime.quantization", "onnx")
    before, after = given.directory / "float.onnx", given.directory / "int8.onnx"
    before.write_bytes(given.float_onnx)
    tools.quantize_static(
        before,
        after,
        _Reader([image[None].numpy() for image in given.images(CALIBRATION_IMAGES, seed=1)]),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
    )
    return _session(given, str(after))


class _Reader:
    """What ONNX Runtime calibrates on."""

    def __init__(self, images: list[NDArray[np.float32]]) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._left, None)
        return None if image is None else {"images": image}


def _compiled(given: Contestants, model: Any) -> Predict:
    from dfq.exporting.openvino_model import compile_model

    compiled = compile_model(require("openvino", "openvino"), model, given.threads)
    return lambda images: compiled(images.numpy())


def _openvino_dfq(given: Contestants) -> Predict:
    from dfq.exporting.openvino_model import read_model

    return _compiled(given, read_model(require("openvino", "openvino"), given.quantized_onnx))


def _openvino_int8(given: Contestants) -> Predict:
    """NNCF's post-training quantization with its settings for transformers."""
    from dfq.exporting.openvino_model import read_model

    nncf = require("nncf", "benchmark")
    model = read_model(require("openvino", "openvino"), given.float_onnx)
    images = [image[None].numpy() for image in given.images(CALIBRATION_IMAGES, seed=1)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION_IMAGES,
    )
    return _compiled(given, quantized)


@dataclass(frozen=True)
class Runtime:
    """``packages`` have to be installed, which ``extra`` does; only if ``asked`` for by name."""

    build: Callable[[Contestants], Predict]
    packages: tuple[str, ...] = ()
    extra: str = ""
    asked: bool = False


RUNTIMES: dict[str, Runtime] = {
    "dfq": Runtime(_dfq),
    "dfq-compiled": Runtime(_dfq_compiled, asked=True),
    "torch-fp32": Runtime(_torch_fp32),
    "torch-bf16": Runtime(_torch_bf16),
    "onnxruntime-int8": Runtime(_onnxruntime_int8, ("onnx", "onnxruntime"), "onnx"),
    "onnxruntime-dfq": Runtime(_onnxruntime_dfq, ("onnx", "onnxruntime"), "onnx"),
    "openvino-int8": Runtime(_openvino_int8, ("onnx", "openvino", "nncf"), "benchmark"),
    "openvino-dfq": Runtime(_openvino_dfq, ("onnx", "openvino"), "openvino"),
}
"""In the order in which they are shown."""
