"""Two 4-bit integers to a byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dfq.quantization.layers import IntegerLinear
from dfq.quantization.packing import pack_int4, unpack_int4
from dfq.quantization.quantizer import Quantizer
from dfq.quantization.rounding import WeightScales

QUICK = settings(deadline=None, max_examples=60, derandomize=True)

arrays = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
    elements=st.integers(-8, 7),
)


@QUICK
@given(arrays)
def test_unpacking_restores_what_was_packed(values: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(values))
    restored = unpack_int4(packed, values.shape[-1])
    assert restored.dtype == torch.int8
    assert np.array_equal(restored.numpy(), values)


@QUICK
@given(arrays)
def test_packed_bytes_are_as_specified(values: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(values))
    length = values.shape[-1]
    assert packed.dtype == torch.uint8
    assert packed.shape == (*values.shape[:-1], (length + 1) // 2)
    rows = values.reshape(-1, length).tolist()
    for row, found in zip(rows, packed.reshape(len(rows), -1).tolist(), strict=True):
        padded = row + [0] * (length % 2)
        pairs = zip(padded[0::2], padded[1::2], strict=True)
        assert found == [(low & 15) + 16 * (high & 15) for low, high in pairs]


@pytest.mark.parametrize(
    ("values", "packed"),
    [([1, -1, 7], [0xF1, 0x07]), ([-7, 2, 0, -2], [0x29, 0xE0]), ([-8], [0x08]), ([], [])],
)
def test_low_nibble_comes_first(values: list[int], packed: list[int]) -> None:
    assert pack_int4(torch.tensor(values, dtype=torch.int8)).tolist() == packed


def test_every_byte_unpacks_and_packs_to_itself() -> None:
    packed = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(packed, 512)), packed)


def test_high_nibble_of_an_odd_row_is_ignored() -> None:
    assert unpack_int4(torch.tensor([[0xF3]], dtype=torch.uint8), 1).tolist() == [[3]]


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_values_beyond_four_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        pack_int4(torch.tensor([0, value], dtype=torch.int8))


@pytest.mark.parametrize("in_features", [1, 6, 7])
def test_layer_holds_four_bit_weights_packed(in_features: int) -> None:
    generator = torch.Generator().manual_seed(in_features)
    integers = torch.randint(-7, 8, (3, in_features), generator=generator, dtype=torch.int8)
    layer = IntegerLinear(in_features, 3, 4)
    layer.assign(
        integers, WeightScales(torch.ones(3)), torch.zeros(3), Quantizer(0.5, 3, signed=False)
    )
    assert layer.weight.shape == (3, (in_features + 1) // 2)
    assert torch.equal(layer.integers(), integers)
