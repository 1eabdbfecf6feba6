"""Symmetric activations: signed integers with zero point 0."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from exported_models import images_for, quantized_as, spread
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq import runtime
from dfq.errors import SettingError
from dfq.quantization import IntegerLinear
from dfq.quantization.calibration import Calibration, check_calibration
from dfq.quantization.observers import RangeObserver
from dfq.quantization.scheme import Scheme, layers
from dfq.recipe import Observer, QuantizationSettings
from dfq.runtime import reference
from dfq.runtime.qtype import UINT8, QParams, QType
from dfq.vit.load import load_model

OBSERVERS: list[Observer] = ["minmax", "moving_average", "histogram", "percentile", "mse"]


def symmetric(**changes: Any) -> QuantizationSettings:
    return QuantizationSettings(activations="symmetric", **changes)


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (6, -32, 31), (4, -8, 7)])
def test_inputs_but_pixels_are_signed(bits: int, low: int, high: int) -> None:
    scheme = Scheme(symmetric(input_bits=bits))
    found = scheme.for_layer("blocks.0.mlp.fc2").input
    assert (found.qmin, found.qmax) == (low, high)
    assert scheme.for_layer("patch_embed").input == UINT8
    assert scheme.name == f"w8a{bits}-symmetric"


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (6, 31)])
def test_the_largest_magnitude_becomes_the_largest_integer(
    kind: Observer, bits: int, largest: int
) -> None:
    """TensorRT's scale is the largest magnitude over 127."""
    observer = RangeObserver(kind, QType(bits, signed=True))
    observer.observe(torch.linspace(-1.0, 3.0, 4001))
    found = observer.calculate_qparams()
    assert found.zero_point == 0
    width = 0.2 if kind in ("mse", "histogram") else 0.005
    assert 3 * (1 - width) / largest <= found.scale <= 3.01 / largest


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.integers(4, 8),
    st.floats(1e-6, 1e6),
    st.lists(st.floats(-1e8, 1e8, width=32), min_size=1, max_size=50),
)
def test_shifted_integers_stand_for_the_same_values(
    bits: int, scale: float, values: list[float]
) -> None:
    x = torch.tensor(values)
    qparams = QParams(scale, 0, QType(bits, signed=True))
    signed, unsigned = (reference.quantize(x, q) for q in (qparams, qparams.unsigned))
    assert (signed.dtype, unsigned.dtype) == (torch.int8, torch.uint8)
    assert torch.equal(unsigned.int() - signed.int(), torch.full_like(signed.int(), 1 << bits - 1))
    assert qparams.unsigned.range == pytest.approx(qparams.range)
    assert qparams.unsigned.unsigned == qparams.unsigned


@pytest.mark.parametrize("family", FAMILIES[:3], ids=lambda f: f.name)
@pytest.mark.parametrize("bits", [4, 8])
def test_backends_agree_on_signed_inputs(family: Any, bits: int) -> None:
    model = quantized_as(family, symmetric(bits=bits))
    for name in layers(model.arch)[1:]:
        layer = model.get_submodule(name)
        assert isinstance(layer, IntegerLinear)
        assert layer.input_qparams.zero_point == int(layer.input_zero_point) == 0
        assert layer.kernel_qparams.zero_point == 128
    images = images_for(model)
    expected = model.set_backend("reference")(images)
    needs = runtime.registry.KernelRequirements(model.max_weight())
    for backend, reason in runtime.explain("cpu", needs).items():
        if reason is None:
            assert spread(model.set_backend(backend)(images), expected) < 0.02


def test_ranges_in_another_type_are_refused() -> None:
    """Those of unsigned inputs have zero points, and 6 bits fewer levels."""
    model = quantized_as(FAMILIES[0], QuantizationSettings())
    loaded = load_model(FAMILIES[0].make(), mean=(0.4,) * 3, std=(0.25,) * 3)
    statistics: dict[str, Any] = dict.fromkeys(layers(model.arch))
    found = Calibration(dict(list(model.activation_qparams().items())[1:]), statistics, 1)
    first = "blocks.0.attn.qkv"
    for changed, words in (
        (symmetric(), f"range of '{first}' in uint8, where the settings say int8"),
        (QuantizationSettings(input_bits=6), f"range of '{first}' in uint8.*say uint6"),
    ):
        with pytest.raises(SettingError, match=words):
            check_calibration(dataclasses.replace(found), loaded.vit, Scheme(changed))
