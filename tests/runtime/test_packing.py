"""Packing of 2- to 7-bit integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported_models import layer_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.quantization.layers import IntegerLinear
from dfq.quantization.rounding import WeightScales
from dfq.runtime.packing import pack_bits, packed_bytes, unpack_bits
from dfq.runtime.qtype import QParams

QUICK = settings(deadline=None, max_examples=150, derandomize=True)

BITS = st.integers(2, 7)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Integers of some bits, of one to three dimensions."""
    bits = draw(BITS)
    shape = draw(st.lists(st.integers(0, 19), min_size=1, max_size=3))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    values = generator.integers(-(1 << bits - 1), 1 << bits - 1, shape)
    return values.astype(np.int8), bits


@QUICK
@given(arrays())
def test_unpacking_restores_what_was_packed(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    restored = unpack_bits(pack_bits(torch.from_numpy(values), bits), bits, values.shape[-1])
    assert restored.dtype == torch.int8
    assert np.array_equal(restored.numpy(), values)


@QUICK
@given(arrays())
def test_packed_bytes_are_as_specified(case: tuple[np.ndarray, int]) -> None:
    """Against the row as one number, whose lowest bits are the first integer."""
    values, bits = case
    length = values.shape[-1]
    packed = pack_bits(torch.from_numpy(values), bits)
    size = packed_bytes(length, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*values.shape[:-1], size)
    rows = values.reshape(-1, length).tolist() if values.size else []
    for row, actual in zip(rows, packed.reshape(-1, size or 1).tolist(), strict=True):
        number = sum((value % (1 << bits)) << (i * bits) for i, value in enumerate(row))
        assert actual == list(number.to_bytes(size, "little"))


@pytest.mark.parametrize(
    ("values", "packed"),
    [([1, -1, 7], [0xF1, 0x07]), ([-7, 2, 0, -2], [0x29, 0xE0]), ([-8], [0x08]), ([], [])],
)
def test_low_nibble_comes_first(values: list[int], packed: list[int]) -> None:
    assert pack_bits(torch.tensor(values, dtype=torch.int8), 4).tolist() == packed


@pytest.mark.parametrize("bits", [2, 4])
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    packed = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(packed, bits, 256 * 8 // bits), bits), packed)


def test_high_nibble_of_an_odd_row_is_ignored() -> None:
    assert unpack_bits(torch.tensor([[0xF3]], dtype=torch.uint8), 4, 1).tolist() == [[3]]


@pytest.mark.parametrize(
    ("value", "bits"), [(-9, 4), (8, 4), (127, 4), (-128, 4), (2, 2), (-3, 2), (64, 7)]
)
def test_values_beyond_their_bits_are_refused(value: int, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"int{bits} takes {-(1 << bits - 1)}\.\."):
        pack_bits(torch.tensor([0, value], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("in_features", [1, 6, 7, 33])
def test_layer_holds_its_weights_packed(in_features: int, bits: int) -> None:
    scheme = layer_scheme(bits, group=0)
    generator = torch.Generator().manual_seed(in_features)
    low, high = scheme.weight.qmin, scheme.weight.qmax
    integers = torch.randint(low, high + 1, (3, in_features), generator=generator).to(torch.int8)
    layer = IntegerLinear(in_features, 3, scheme)
    layer.assign(integers, WeightScales(torch.ones(3)), torch.zeros(3), QParams(0.5, 3))
    assert layer.weight.shape == (3, -(-in_features * bits // 8))
    assert torch.equal(layer.integers(), integers)


def test_a_layer_keeps_the_kernels_copy_of_its_weight_and_no_unpacked_one() -> None:
    layer = IntegerLinear(64, 8, layer_scheme(4))
    layer(torch.zeros(1, 64))
    _, params, _ = layer.prepare()
    assert "integers" not in vars(params.weight)
    assert params.weight.content is layer.weight
