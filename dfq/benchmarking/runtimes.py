"""Runtimes of the benchmark, each built as a function of images."""

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
"""Number of random calibration images for other tools, of which only the speed is measured."""

TRIALS = 3


@dataclass(frozen=True)
class BenchmarkInputs:
    """The forms of a checkpoint from which runtimes are built.

    ``threads``: threads of each runtime.  ``directory``: place for temporary files.
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
        """Return normalized random pixels, float32 ``[count, C, H, W]``."""
        arch, prepared = self.model.arch, self.model.preprocessing
        generator = torch.Generator().manual_seed(seed)
        shape = (count, arch.in_channels, *arch.image_size)
        return images_to_input(torch.randint(0, 256, shape, generator=generator), prepared)


Predict = Callable[[Tensor], Any]
"""Function of a built runtime: normalized images to logits."""


def _dfq(inputs: BenchmarkInputs) -> Predict:
    return inputs.model


def _dfq_compiled(inputs: BenchmarkInputs) -> Predict:
    model = copy.deepcopy(inputs.model)
    model.compile()
    return model


def _torch_fp32(inputs: BenchmarkInputs) -> Predict:
    return _inference(inputs.float_model)


def _inference(vit: ViT) -> Predict:
    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = vit(images)
            return logits

    return predict


class _FusedAttention(torch.nn.Module):
    """Attention by PyTorch's fused kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)


def _torch_bf16(inputs: BenchmarkInputs) -> Predict:
    """Use fused or separate attention kernels, whichever is faster on this processor."""
    forms = []
    for fused in (False, True):
        vit = dequantized(inputs.model).bfloat16()
        for index in range(vit.arch.depth if fused else 0):
            vit.block(index).attn.product = _FusedAttention()
        forms.append(_in_bfloat16(_inference(vit)))
    images = inputs.images(1)
    return min(forms, key=lambda form: _fastest(lambda: form(images)))


def _in_bfloat16(predict: Predict) -> Predict:
    return lambda images: predict(images.bfloat16())


def _fastest(run: Run) -> float:
    run()
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _session(inputs: BenchmarkInputs, model: bytes | str) -> Predict:
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = inputs.threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _onnxruntime_dfq(inputs: BenchmarkInputs) -> Predict:
    return _session(inputs, inputs.quantized_onnx)


def _onnxruntime_int8(inputs: BenchmarkInputs) -> Predict:
    """Quantize with ONNX Runtime's static quantization, weights per channel."""
    tools = require("onnxruntime.quantization", "onnx")
    before, after = inputs.directory / "float.onnx", inputs.directory / "int8.onnx"
    before.write_bytes(inputs.float_onnx)
    tools.quantize_static(
        before,
        after,
        _CalibrationReader(
            [image[None].numpy() for image in inputs.images(CALIBRATION_IMAGES, seed=1)]
        ),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
    )
    return _session(inputs, str(after))


class _CalibrationReader:
    """Calibration data reader for ONNX Runtime."""

    def __init__(self, images: list[NDArray[np.float32]]) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._left, None)
        return None if image is None else {"images": image}


def _compiled(inputs: BenchmarkInputs, model: Any) -> Predict:
    from dfq.exporting.openvino_model import compile_model

    compiled = compile_model(require("openvino", "openvino"), model, inputs.threads)
    return lambda images: compiled(images.numpy())


def _openvino_dfq(inputs: BenchmarkInputs) -> Predict:
    from dfq.exporting.openvino_model import read_model

    return _compiled(inputs, read_model(require("openvino", "openvino"), inputs.quantized_onnx))


def _openvino_int8(inputs: BenchmarkInputs) -> Predict:
    """Quantize with NNCF's post-training quantization for transformers."""
    from dfq.exporting.openvino_model import read_model

    nncf = require("nncf", "benchmark")
    model = read_model(require("openvino", "openvino"), inputs.float_onnx)
    images = [image[None].numpy() for image in inputs.images(CALIBRATION_IMAGES, seed=1)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION_IMAGES,
    )
    return _compiled(inputs, quantized)


@dataclass(frozen=True)
class Runtime:
    """A runtime of the benchmark.

    ``packages``: packages that it needs, installed by ``extra``.  ``opt_in``: measured only if it
    is named.
    """

    build: Callable[[BenchmarkInputs], Predict]
    packages: tuple[str, ...] = ()
    extra: str = ""
    opt_in: bool = False


RUNTIMES: dict[str, Runtime] = {
    "dfq": Runtime(_dfq),
    "dfq-compiled": Runtime(_dfq_compiled, opt_in=True),
    "torch-fp32": Runtime(_torch_fp32),
    "torch-bf16": Runtime(_torch_bf16),
    "onnxruntime-int8": Runtime(_onnxruntime_int8, ("onnx", "onnxruntime"), "onnx"),
    "onnxruntime-dfq": Runtime(_onnxruntime_dfq, ("onnx", "onnxruntime"), "onnx"),
    "openvino-int8": Runtime(_openvino_int8, ("onnx", "openvino", "nncf"), "benchmark"),
    "openvino-dfq": Runtime(_openvino_dfq, ("onnx", "openvino"), "openvino"),
}
"""Runtimes in the order in which they are shown."""
