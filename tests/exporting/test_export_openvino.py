"""The OpenVINO file: what the checkpoint computes, on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import MEMBERS, allow_lowest_int8, images_for, quantized, spread
from families import Family

from dfq.exporting.program import reference_form

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

from dfq.exporting.onnx_model import onnx_bytes  # noqa: E402
from dfq.exporting.openvino_model import (  # noqa: E402
    compile_model,
    integers_in,
    is_export,
    read_model,
    save_ir,
)
from dfq.exporting.products import QuantizedProducts, integer_products  # noqa: E402

FLOAT32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


@pytest.mark.parametrize(("bits", "attention"), [(8, "float"), (4, "int8")])
@pytest.mark.parametrize("family", MEMBERS[::4])
@torch.no_grad()
def test_the_file_computes_what_the_reference_does_on_integers(
    family: Family, bits: int, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_lowest_int8(monkeypatch)
    model = quantized(family, bits=bits, attention=attention)
    path = tmp_path / "model.xml"
    save_ir(onnx_bytes(model, QuantizedProducts(model)), {"scheme": "w8a8"}, path)
    images = images_for(model)
    compiled = openvino.Core().compile_model(path, "CPU", FLOAT32)
    found = torch.from_numpy(compiled(images.numpy())[0])
    assert spread(found, reference_form(model)(images)) < 0.03
    names = integer_products(model)
    assert integers_in(compiled, names) == names
    assert integers_in(compile_model(openvino, path, 1), names) == names


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
    compiled = openvino.Core().compile_model(read_model(openvino, content), "CPU", FLOAT32)
    images = images_for(model)
    found = torch.from_numpy(compiled(images.numpy())[0])
    assert spread(found, reference_form(model)(images)) < 0.1
