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

from dfq import checkpoint as checkpoints
from dfq.engines.inputs import random_images
from dfq.engines.module import EngineModel, open_engine
from dfq.exporting.forms import dequantized
from dfq.extras import require
from dfq.quantization.model import QuantizedViT
from dfq.vit import ViT

Run = Callable[[], Any]
"""One inference of a fixed batch."""

CALIBRATION_IMAGES = 8
"""Number of random calibration images for other tools, of which only the speed is measured."""

TRIALS = 3

GROUP = 32
"""Inputs that share a scale in torchao's 4-bit weights."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchmarkInputs:
    """The forms of a checkpoint from which runtimes are built.

    ``model``: the checkpoint as loaded on ``device``.  ``threads``: threads of each runtime.
    ``directory``: place for temporary files.  ``cache``: cache directory of the engines' files.
    """

    checkpoint: Path
    model: QuantizedViT
    threads: int
    directory: Path
    cache: Path
    device: torch.device = CPU

    @cached_property
    def float_model(self) -> ViT:
        """The checkpoint's dequantized weights in float32."""
        return dequantized(self.model).to(self.device)

    @cached_property
    def float_onnx(self) -> bytes:
        from dfq.exporting.onnx_model import onnx_bytes
        from dfq.exporting.products import FloatProducts

        return onnx_bytes(self.float_model, FloatProducts(self.float_model))

    def engine(self, name: str) -> EngineModel:
        """Return the checkpoint on an engine, as ``dfq.load(..., runtime=name)``."""
        info = checkpoints.read_info(self.checkpoint)
        digest = checkpoints.verified_digest(self.checkpoint)
        return open_engine(self.checkpoint, info, digest, name, self.cache)

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Return normalized random pixels, float32 ``[count, C, H, W]``."""
        images = random_images(self.model.arch, self.model.preprocessing, count, seed)
        return images.to(self.device)

    def wait(self) -> None:
        """Wait until the device has computed what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Predict = Callable[[Tensor], Any]
"""Function of a built runtime: normalized images to logits."""


def _dfq(inputs: BenchmarkInputs) -> Predict:
    return inputs.model


def _dfq_compiled(inputs: BenchmarkInputs) -> Predict:
    model = copy.deepcopy(inputs.model)
    model.compile()
    return model


def _dfq_eager(inputs: BenchmarkInputs) -> Predict:
    model = copy.deepcopy(inputs.model)
    model.graphs.enabled = False
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


def _torch_fp16(inputs: BenchmarkInputs) -> Predict:
    return _attention_by_speed(inputs, torch.float16)


def _torch_bf16(inputs: BenchmarkInputs) -> Predict:
    return _attention_by_speed(inputs, torch.bfloat16)


def _attention_by_speed(inputs: BenchmarkInputs, dtype: torch.dtype) -> Predict:
    """Use fused or separate attention kernels, whichever is faster on this device."""
    forms = [_half(inputs, dtype, fused) for fused in (False, True)]
    images = inputs.images(1)

    def once(form: Predict) -> None:
        form(images)
        inputs.wait()

    return min(forms, key=lambda form: _fastest(lambda: once(form)))


def _half(inputs: BenchmarkInputs, dtype: torch.dtype, fused: bool) -> Predict:
    predict = _inference(_half_model(inputs, dtype, fused))
    return lambda images: predict(images.to(dtype))


def _half_model(inputs: BenchmarkInputs, dtype: torch.dtype, fused: bool) -> ViT:
    vit = copy.deepcopy(inputs.float_model).to(dtype)
    for index in range(vit.arch.depth if fused else 0):
        vit.block(index).attn.product = _FusedAttention()
    return vit


def _torch_bf16_compiled(inputs: BenchmarkInputs) -> Predict:
    vit = _half_model(inputs, torch.bfloat16, fused=True)
    vit.compile()
    predict = _inference(vit)
    return lambda images: predict(images.bfloat16())


def _fastest(run: Run) -> float:
    run()
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _torchao(inputs: BenchmarkInputs, config: str, compiled: bool, **options: Any) -> Predict:
    """Quantize the float model's linear layers by a configuration of torchao; 4-bit weights where
    their groups divide the inputs."""
    tools = require("torchao.quantization", "benchmark")
    dtype = torch.bfloat16 if inputs.device.type == "cuda" else torch.float32
    vit = _half_model(inputs, dtype, fused=compiled)
    group = GROUP if options else 1

    def chosen(module: torch.nn.Module, _: str) -> bool:
        return isinstance(module, torch.nn.Linear) and module.in_features % group == 0

    tools.quantize_(vit, getattr(tools, config)(**options), filter_fn=chosen)
    if compiled:
        vit.compile()

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():  # torchao's tensors are no inference tensors
            logits: Tensor = vit(images.to(dtype))
            return logits

    return predict


def _torchao_int8(inputs: BenchmarkInputs) -> Predict:
    compiled = inputs.device.type == "cuda"
    return _torchao(inputs, "Int8DynamicActivationInt8WeightConfig", compiled)


def _torchao_int8_compiled(inputs: BenchmarkInputs) -> Predict:
    return _torchao(inputs, "Int8DynamicActivationInt8WeightConfig", True)


def _torchao_int8_weights(inputs: BenchmarkInputs) -> Predict:
    return _torchao(inputs, "Int8WeightOnlyConfig", inputs.device.type == "cuda")


def _torchao_int8_int4(inputs: BenchmarkInputs) -> Predict:
    int4 = torch.int4  # type: ignore[attr-defined]
    return _torchao(inputs, "Int8DynamicActivationIntxWeightConfig", False, weight_dtype=int4)


def _session(inputs: BenchmarkInputs, model: bytes | str) -> Predict:
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = inputs.threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _onnxruntime_dfq(inputs: BenchmarkInputs) -> Predict:
    return inputs.engine("onnxruntime")


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


def _openvino_dfq(inputs: BenchmarkInputs) -> Predict:
    return inputs.engine("openvino")


def _openvino_int8(inputs: BenchmarkInputs) -> Predict:
    """Quantize with NNCF's post-training quantization for transformers."""
    from dfq.exporting.openvino_model import compile_model, read_model

    nncf = require("nncf", "benchmark")
    model = read_model(require("openvino", "openvino"), inputs.float_onnx)
    images = [image[None].numpy() for image in inputs.images(CALIBRATION_IMAGES, seed=1)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION_IMAGES,
    )
    compiled = compile_model(require("openvino", "openvino"), quantized, inputs.threads)
    return lambda images: compiled(images.numpy())


@dataclass(frozen=True)
class Runtime:
    """A runtime of the benchmark.

    ``packages``: packages that it needs, installed by ``extra``.  ``opt_in``: measured only if it
    is named.  ``devices``: types of the devices that it runs on.  ``compiles``: whether the first
    call of a batch size compiles; its time does not count.
    """

    build: Callable[[BenchmarkInputs], Predict]
    packages: tuple[str, ...] = ()
    extra: str = ""
    opt_in: bool = False
    devices: tuple[str, ...] = ("cpu",)
    compiles: bool = False


ANYWHERE, GPU = ("cpu", "cuda"), ("cuda",)
ONNXRUNTIME, OPENVINO = ("onnx", "onnxruntime"), ("onnx", "openvino")
TORCHAO = (("torchao",), "benchmark")

RUNTIMES: dict[str, Runtime] = {
    "dfq": Runtime(_dfq, devices=ANYWHERE),
    "dfq-compiled": Runtime(_dfq_compiled, opt_in=True, devices=ANYWHERE, compiles=True),
    "dfq-eager": Runtime(_dfq_eager, opt_in=True, devices=ANYWHERE),
    "torch-fp32": Runtime(_torch_fp32, devices=ANYWHERE),
    "torch-fp16": Runtime(_torch_fp16, devices=GPU),
    "torch-bf16": Runtime(_torch_bf16, devices=ANYWHERE),
    "torch-bf16-compiled": Runtime(_torch_bf16_compiled, devices=GPU, compiles=True),
    "onnxruntime-int8": Runtime(_onnxruntime_int8, ONNXRUNTIME, "onnx"),
    "onnxruntime-dfq": Runtime(_onnxruntime_dfq, ONNXRUNTIME, "onnx"),
    "openvino-int8": Runtime(_openvino_int8, (*OPENVINO, "nncf"), "benchmark"),
    "openvino-dfq": Runtime(_openvino_dfq, OPENVINO, "openvino"),
    "torchao-int8": Runtime(_torchao_int8, *TORCHAO, devices=ANYWHERE, compiles=True),
    "torchao-int8-compiled": Runtime(_torchao_int8_compiled, *TORCHAO, opt_in=True, compiles=True),
    "torchao-int8-int4": Runtime(_torchao_int8_int4, *TORCHAO),
    "torchao-int8-weights": Runtime(_torchao_int8_weights, *TORCHAO, devices=GPU, compiles=True),
}
"""Runtimes in the order in which they are shown."""

RECORDED = {"dfq": "torch", "onnxruntime-dfq": "onnxruntime", "openvino-dfq": "openvino"}
"""Values of ``runtime`` of :func:`dfq.load`, by the runtime that measures them."""
