"""The ONNX file: every family beside the reference arithmetic, and what runs on integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported_models import (
    EXTREMES,
    MEMBERS,
    W8,
    attention_bytes,
    demo_images,
    images_for,
    layer_scheme,
    onnx_session,
    quantized,
    quantized_demo,
    reference_attention,
    spread,
)
from families import FAMILIES, Family
from torch import Tensor

from dfq.errors import UnsupportedModelError
from dfq.exporting.forms import dequantized
from dfq.exporting.program import reference_form
from dfq.quantization import QuantizedViT
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.rounding import WeightScales
from dfq.runtime.qtype import QParams

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from dfq.exporting import onnx_model  # noqa: E402
from dfq.exporting.graph import Graph  # noqa: E402
from dfq.exporting.onnx_model import onnx_bytes  # noqa: E402
from dfq.exporting.products import (  # noqa: E402
    FloatProducts,
    QuantizedProducts,
    integer_products,
)
from dfq.exporting.weights import WeightType, write_weight  # noqa: E402

INTEGER_KERNELS = ("MatMulIntegerToFloat", "QLinearMatMul")


def run(content: bytes, images: Tensor) -> Tensor:
    (logits,) = onnx_session(content).run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def kernels(content: bytes, directory: Path) -> dict[str, str]:
    """Operator of every node that ONNX Runtime executes, by the node's name."""
    onnx_session(content, directory / "optimized.onnx")
    return {n.name: n.op_type for n in onnx.load(directory / "optimized.onnx").graph.node}


def quantized_bytes(model: QuantizedViT, weights: WeightType = "int8") -> bytes:
    return onnx_bytes(model, QuantizedProducts(model, weights))


@pytest.mark.parametrize("family", MEMBERS)
@torch.no_grad()
def test_every_family_computes_what_the_reference_does(family: Family) -> None:
    model = quantized(family, bits=4, attention="int8")
    images = images_for(model)
    assert spread(run(quantized_bytes(model), images), reference_form(model)(images)) < 0.015


@pytest.mark.parametrize("family", MEMBERS)
@torch.no_grad()
def test_every_family_has_a_float_graph(family: Family) -> None:
    vit = dequantized(quantized(family, bits=8, attention="float"))
    images = images_for(vit)
    assert spread(run(onnx_bytes(vit, FloatProducts(vit)), images), vit(images)) < 1e-5


# ---- what runs


@pytest.mark.parametrize("attention", ["float", "int8"])
@pytest.mark.parametrize("family", MEMBERS[::4])
def test_onnx_runtime_runs_every_quantized_product_on_integers(
    family: Family, attention: str, tmp_path: Path
) -> None:
    model = quantized(family, bits=8, attention=attention)
    actual = kernels(quantized_bytes(model), tmp_path)
    names = integer_products(model)
    assert {actual[name] for name in names} <= set(INTEGER_KERNELS)
    others = [name for name, kind in actual.items() if kind in INTEGER_KERNELS]
    assert sorted(others) == sorted(names)


def test_products_are_those_of_layers_and_of_integer_attention() -> None:
    names = integer_products(quantized(FAMILIES[0], bits=8, attention="int8"))
    assert len(names) == 1 + 2 * 4 + 1 + 2 * 2
    assert {"patch_embed/MatMul", "blocks.1.attn.scores/MatMul", "head/MatMul"} <= set(names)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("attention", ["float", "int8"])
@torch.no_grad()
def test_the_demo_predicts_what_the_checkpoint_does(bits: int, attention: str) -> None:
    model = quantized_demo(bits, attention)
    images = demo_images(100)
    agreement = run(quantized_bytes(model), images).argmax(-1) == model(images).argmax(-1)
    assert float(agreement.float().mean()) >= 0.99


@torch.no_grad()
def test_quantized_attention_rounds_where_the_reference_does() -> None:
    model = quantized(next(f for f in FAMILIES if f.name == "DINOv3"), bits=8, attention="int8")
    images = images_for(model)
    assert spread(run(quantized_bytes(model), images), reference_form(model)(images)) < 0.015


@pytest.mark.parametrize("extreme", EXTREMES)
def test_attention_of_the_largest_integers_is_exact(extreme: str) -> None:
    operands = EXTREMES[extreme]
    feed = {name: operand.numpy() for name, operand in operands.items()}
    actual = onnx_session(attention_bytes(operands)).run(None, feed)[0]
    torch.testing.assert_close(torch.from_numpy(actual), reference_attention(operands))


@pytest.mark.parametrize("family", MEMBERS)
@torch.no_grad()
def test_no_images_have_no_logits(family: Family) -> None:
    model = quantized(family, bits=8, attention="int8")
    images = images_for(model, 1)[:0]
    actual = run(quantized_bytes(model), images)
    assert actual.shape == model(images).shape
    assert len(actual) == 0


@torch.no_grad()
def test_any_number_of_images_is_taken() -> None:
    model = quantized(FAMILIES[0], bits=8, attention="float")
    content, images = quantized_bytes(model), images_for(model, 5)
    whole = run(content, images)
    alone = torch.cat([run(content, image[None]) for image in images])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pixels_right_of_the_last_whole_patch_are_left_out() -> None:
    family = next(f for f in FAMILIES if f.name == "ViT, DeiT")
    model = quantized(Family("", "", "", "", lambda: family.make(img_size=18)), **W8)
    images = images_for(model)
    changed = images.clone()
    changed[:, :, 16:], changed[:, :, :, 16:] = 5, 5
    content = quantized_bytes(model)
    assert images.shape[-1] == 18
    assert torch.equal(run(content, images), run(content, changed))


@torch.no_grad()
def test_the_patch_embedding_reads_pixels() -> None:
    model = quantized(FAMILIES[0], **W8)
    images = images_for(model)
    nudged = images + 0.3 / 255 / 0.25 * torch.rand_like(images)
    content = quantized_bytes(model)
    assert torch.equal(run(content, images), run(content, nudged))


# ---- 4-bit weights


@pytest.mark.parametrize("family", MEMBERS[::5])
@torch.no_grad()
def test_four_bits_mean_what_widened_ones_do(family: Family) -> None:
    model = quantized(family, bits=4, attention="int8")
    images = images_for(model)
    assert (
        spread(run(quantized_bytes(model, "int4"), images), reference_form(model)(images)) < 0.015
    )


@pytest.mark.parametrize(("inputs", "kind"), [(64, "INT4"), (48, "INT4"), (50, "INT8")])
def test_weights_stay_four_bits_where_blocks_divide_the_inputs(inputs: int, kind: str) -> None:
    graph, layer = Graph(), IntegerLinear(inputs, 6, layer_scheme(4))
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (6, inputs), generator=generator).to(torch.int8)
    groups = torch.randint(1, 17, (6, 2), generator=generator).to(torch.uint8)
    scales = WeightScales(torch.rand(6, generator=generator) + 0.1, groups, 32)
    layer.assign(integers, scales, torch.zeros(6), QParams(0.1, 3))
    output = write_weight(graph, layer, "int4")
    assert kind in {TensorProto.DataType.Name(c.data_type) for c in graph.constants.values()}
    torch.testing.assert_close(evaluated(graph, output, (inputs, 6)).T, scales.dequantize(integers))


def evaluated(graph: Graph, output: str, shape: tuple[int, int]) -> Tensor:
    """The value of a graph without inputs."""
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
    proto = helper.make_graph(graph.nodes, "g", [], [value], list(graph.constants.values()))
    opsets = [helper.make_opsetid("", onnx_model.OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=onnx_model.IR_VERSION)
    return torch.from_numpy(onnx_session(model.SerializeToString()).run(None, {})[0])


def test_four_bit_weights_take_half_the_file() -> None:
    model = quantized_demo(4, "float")
    assert len(quantized_bytes(model, "int4")) < 0.7 * len(quantized_bytes(model))


# ---- the file


def test_the_same_model_gives_the_same_bytes() -> None:
    model = quantized(FAMILIES[0], **W8)
    assert quantized_bytes(model) == quantized_bytes(model)


@pytest.mark.parametrize("classes", [5, 0])
def test_inputs_and_outputs_are_named(classes: int) -> None:
    family = Family("", "", "", "", lambda: FAMILIES[0].make(num_classes=classes))
    graph = onnx.load_from_string(quantized_bytes(quantized(family, **W8))).graph
    (images,), (output,) = graph.input, graph.output
    sides = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, sides) == ("images", ["N", 3, 16, 16])
    assert output.name == ("logits" if classes else "features")
    assert output.type.tensor_type.shape.dim[1].dim_value == (classes or 48)


def test_a_model_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "LIMIT", 1000)
    with pytest.raises(UnsupportedModelError, match=r"ends at 2 GB.*format='torch'"):
        quantized_bytes(quantized(FAMILIES[0], **W8))
