"""The OpenVINO file: what the checkpoint computes, on integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported_models import (
    EXTREMES,
    MEMBERS,
    OPENVINO_FLOAT32,
    attention_bytes,
    images_for,
    quantized,
    reference_attention,
    spread,
)
from families import Family

from dfq.exporting.program import reference_form

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

from dfq.exporting.forms import integer_layers  # noqa: E402
from dfq.exporting.onnx_model import onnx_bytes  # noqa: E402
from dfq.exporting.openvino_model import (  # noqa: E402
    compile_model,
    integers_in,
    is_export,
    read_model,
    save_ir,
)
from dfq.exporting.products import QuantizedProducts, integer_products  # noqa: E402


@pytest.mark.parametrize(("bits", "attention"), [(8, "float"), (4, "int8")])
@pytest.mark.parametrize("family", MEMBERS[::4])
@torch.no_grad()
def test_the_file_computes_what_the_reference_does_on_integers(
    family: Family, bits: int, attention: str, tmp_path: Path
) -> None:
    model = quantized(family, bits=bits, attention=attention)
    path = tmp_path / "model.xml"
    save_ir(onnx_bytes(model, QuantizedProducts(model)), {"scheme": "w8a8"}, path)
    images = images_for(model)
    compiled = openvino.Core().compile_model(path, "CPU", OPENVINO_FLOAT32)
    actual = torch.from_numpy(compiled(images.numpy())[0])
    assert spread(actual, reference_form(model)(images)) < 0.015
    names, layers = integer_products(model), [f"{n}/MatMul" for n in integer_layers(model)]
    assert integers_in(compiled, names) == layers
    assert integers_in(compile_model(openvino, path, 1), names) == layers


@pytest.mark.parametrize("extreme", EXTREMES)
def test_attention_of_the_largest_integers_is_exact(extreme: str) -> None:
    operands = EXTREMES[extreme]
    model = read_model(openvino, attention_bytes(operands))
    compiled = openvino.Core().compile_model(model, "CPU", OPENVINO_FLOAT32)
    actual = compiled({name: operand.numpy() for name, operand in operands.items()})[0]
    torch.testing.assert_close(torch.from_numpy(actual), reference_attention(operands))


@pytest.mark.parametrize("family", MEMBERS[::4])
@torch.no_grad()
def test_no_images_have_no_logits(family: Family) -> None:
    model = quantized(family, bits=8, attention="int8")
    content = onnx_bytes(model, QuantizedProducts(model))
    compiled = openvino.Core().compile_model(read_model(openvino, content), "CPU", OPENVINO_FLOAT32)
    images = images_for(model, 1)[:0]
    assert compiled(images.numpy())[0].shape == tuple(model(images).shape)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = quantized(MEMBERS[0].values[0], bits=8, attention="float")
    path = tmp_path / "model.xml"
    save_ir(onnx_bytes(model, QuantizedProducts(model)), {"scheme": "w8a8"}, path)
    assert is_export(path)
    assert openvino.Core().read_model(path).get_rt_info(["dfq", "scheme"]).astype(str) == "w8a8"


@pytest.mark.parametrize("family", MEMBERS[::5])
@torch.no_grad()
def test_four_bit_weights_in_onnx_are_read(family: Family) -> None:
    model = quantized(family, bits=4, attention="float")
    content = onnx_bytes(model, QuantizedProducts(model, "int4"))
    options = {**OPENVINO_FLOAT32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(read_model(openvino, content), "CPU", options)
    images = images_for(model)
    actual = torch.from_numpy(compiled(images.numpy())[0])
    assert spread(actual, reference_form(model)(images)) < 0.015
