"""ONNX files for TensorRT: its rules of explicit quantization, and ONNX Runtime's logits.

TensorRT itself does not run here.  The rules are those of "Explicit Quantization", "Fused
Attention" and "ONNX Opset Guide" in the documentation of TensorRT 11, and of the operators of its
ONNX parser (docs/operators.md of onnx-tensorrt).
"""

from __future__ import annotations

import importlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_models import checkpoint_of, images_for, quantized_as, spread
from families import FAMILIES
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import SettingError
from dfq.exporting.forms import integer_layers
from dfq.exporting.program import reference_form
from dfq.quantization.model import QuantizedViT
from dfq.recipe import QuantizationSettings

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
onnx_bytes = importlib.import_module("dfq.exporting.onnx_model").onnx_bytes
TensorRTProducts = importlib.import_module("dfq.exporting.tensorrt").TensorRTProducts

OPSETS = range(9, 26)
PARSED = {
    "Add", "Cast", "Concat", "DequantizeLinear", "Div", "Expand", "Gather", "Gelu",
    "LayerNormalization", "MatMul", "Mul", "QuantizeLinear", "ReduceMean", "Reshape", "Shape",
    "Sigmoid", "Slice", "Softmax", "Split", "Transpose",
}  # fmt: skip
"""Operators that TensorRT's ONNX parser knows, of those that a transformer needs."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


class File:
    """A file's nodes, constants and the types of its values."""

    def __init__(self, model: QuantizedViT) -> None:
        self.model = onnx.load_model_from_string(onnx_bytes(model, TensorRTProducts(model)))
        self.depth = model.arch.depth
        self.nodes = list(self.model.graph.node)
        self.writers = {output: node for node in self.nodes for output in node.output}

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        initializers = self.model.graph.initializer
        return {c.name: onnx.numpy_helper.to_array(c) for c in initializers}

    @cached_property
    def types(self) -> dict[str, int]:
        inferred = onnx.shape_inference.infer_shapes(self.model, strict_mode=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        return {value.name: value.type.tensor_type.elem_type for value in values}

    def of(self, *kinds: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type in kinds]

    def readers(self, value: str) -> list[Any]:
        return [node for node in self.nodes if value in node.input]

    def written_by(self, value: str, kind: str) -> Any:
        """The node of this kind that writes a value, or None."""
        node = self.writers.get(value)
        return node if node is not None and node.op_type == kind else None

    def linears(self) -> list[Any]:
        """Products with a dequantized constant."""
        found = (
            (node, self.written_by(node.input[1], "DequantizeLinear")) for node in self.of("MatMul")
        )
        return [node for node, weight in found if weight and weight.input[0] in self.constants]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def file(request: pytest.FixtureRequest) -> File:
    return File(symmetric(request.param))


def symmetric(family: Any, bits: int = 8) -> QuantizedViT:
    settings = QuantizationSettings(bits=bits, activations="symmetric")
    return quantized_as(family, settings).set_backend("reference")


def test_the_parser_knows_every_operator(file: File) -> None:
    (opset,) = file.model.opset_import
    assert (opset.domain, opset.version in OPSETS) == ("", True)
    assert {node.op_type for node in file.nodes} <= PARSED


def test_quantizers_are_int8_with_zero_point_0_and_come_in_pairs(file: File) -> None:
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        scale, zero_point = (file.constants[name] for name in node.input[1:])
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert (scale > 0).all()
    for node in file.of("QuantizeLinear"):
        assert file.constants[node.input[1]].ndim == 0  # one scale for an activation
        (reader,) = file.readers(node.output[0])
        assert (reader.op_type, reader.input[1:]) == ("DequantizeLinear", node.input[1:])


def test_inputs_of_every_linear_layer_are_quantized_and_nothing_else(file: File) -> None:
    linears = file.linears()
    names = {node.name.removesuffix("/MatMul") for node in linears}
    model_layers = {node.name.split("/")[0] for node in file.of("QuantizeLinear")}
    assert names == model_layers
    for node in linears:
        pair = file.written_by(node.input[0], "DequantizeLinear")
        assert file.written_by(pair.input[0], "QuantizeLinear")
        weight = file.written_by(node.input[1], "DequantizeLinear")
        integers, scale = (file.constants[name] for name in weight.input[:2])
        assert integers.dtype == np.int8
        assert integers.min() >= -127
        (axis,) = (a.i for a in weight.attribute if a.name == "axis")
        assert (axis, scale.shape) == (1, (integers.shape[1],))  # a scale an output channel
    for node in file.of("DequantizeLinear"):
        (reader,) = file.readers(node.output[0])
        assert reader in linears  # no bias, residual, norm or activation function reads integers


def test_biases_and_the_residual_stream_are_float32(file: File) -> None:
    """What a product writes meets its bias in float32 and is quantized at the next product only."""
    for node in file.linears():
        (add,) = file.readers(node.output[0])
        bias = file.constants[add.input[1]]
        assert add.op_type == "Add"
        assert (bias.dtype, bias.ndim) == (np.dtype(np.float32), 1)
    adds = [node for node in file.of("Add") if re.fullmatch(r"blocks\.\d+/Add(_2)?", node.name)]
    assert len(adds) == 2 * file.depth
    for node in [*adds, *file.of("LayerNormalization", "Gelu")]:
        assert file.types[node.input[0]] == file.types[node.output[0]] == onnx.TensorProto.FLOAT


def test_attention_is_a_pattern_of_fused_kernels(file: File) -> None:
    """Scaled queries, product, bias, softmax, product, all in float16."""
    scores = [node for node in file.of("MatMul") if node.name.endswith("attn.scores/MatMul")]
    assert scores
    for node in scores:
        query = file.written_by(node.input[0], "Cast")
        assert file.written_by(query.input[0], "Mul")  # the scale, before the product
        (reader,) = file.readers(node.output[0])
        if reader.op_type == "Add":
            (reader,) = file.readers(reader.output[0])
        assert reader.op_type == "Softmax"
        (product,) = file.readers(reader.output[0])
        assert product.op_type == "MatMul"
        for each in (node, reader, product):
            inputs = {file.types[name] for name in each.input}
            assert inputs == {file.types[each.output[0]]} == {onnx.TensorProto.FLOAT16}
        (back,) = file.readers(product.output[0])
        assert (back.op_type, file.types[back.output[0]]) == ("Cast", onnx.TensorProto.FLOAT)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_gives_the_checkpoints_logits(family: Any, bits: int) -> None:
    model = symmetric(family, bits)
    images = images_for(model)
    content = onnx_bytes(model, TensorRTProducts(model))
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    assert spread(torch.from_numpy(found), reference_form(model)(images)) < 0.015


@torch.no_grad()
def test_float16_in_attention_moves_few_activations_by_a_level() -> None:
    """ONNX Runtime leaves the casts out on CPUs; onnx's own evaluator computes them."""
    model = symmetric(FAMILIES[0])
    images, content = images_for(model, 4), onnx_bytes(model, TensorRTProducts(model))
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(content)
    (found,) = evaluator.run(None, {"images": images.numpy()})
    assert spread(torch.from_numpy(found), reference_form(model)(images)) < 0.05


def test_weights_of_4_bits_are_widened_without_loss() -> None:
    model = symmetric(FAMILIES[0], 4)
    file, layers = File(model), integer_layers(model)
    for node in file.linears():
        weight = file.written_by(node.input[1], "DequantizeLinear")
        layer = layers[node.name.removesuffix("/MatMul")]
        assert np.array_equal(file.constants[weight.input[0]].T, layer.integers().numpy())


# ---- dfq.export


def test_target_is_another_name_of_format(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path / "c", activations="symmetric")
    arguments = ["export", str(path), "--target", "tensorrt", "--out", str(tmp_path / "m.onnx")]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0
    assert dfq.export(path, format="tensorrt", out=tmp_path / "m.onnx").products == 10
    props = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert (props["target"], props["scheme"]) == ("tensorrt", "w8a8-symmetric")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "zero point 0 alone.*activations='symmetric'"),
        ({"activations": "symmetric", "attention": "int8"}, "attention='float'"),
        ({"activations": "symmetric", "input_bits": 6}, "'blocks.0.attn.qkv' has 6 bits"),
    ],
)
def test_schemes_that_tensorrt_cannot_run_are_refused_with_the_setting(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = checkpoint_of(tmp_path / "c", **settings)
    with pytest.raises(SettingError, match=words):
        dfq.export(path, format="tensorrt", out=tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
