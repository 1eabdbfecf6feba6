"""Rounding of weights."""

from __future__ import annotations

import pytest
import torch
from exported_models import layer_scheme
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dfq.quantization import rounding
from dfq.quantization.rounding import WeightScales
from dfq.runtime.qtype import QType

INT4 = QType(4, signed=True)
CHANNELS = layer_scheme(4, group=0)
TYPES = [
    layer_scheme(bits, reduce_range=reduce).weight for bits in (4, 8) for reduce in (False, True)
]
every_type = pytest.mark.parametrize("qtype", TYPES, ids=str)


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=g)
    return torch.randn(samples, features, generator=g) @ mixing + 0.5


def weights(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def output_error(x: Tensor, weight: Tensor, integers: Tensor, scales: WeightScales) -> float:
    return float(((weight - scales.dequantize(integers)) @ x.T).square().mean())


@every_type
def test_searched_scales_are_no_worse_than_the_full_range(qtype: QType) -> None:
    weight = weights(16, 200)
    weight[:, 0] *= 6

    def loss(scale: Tensor) -> Tensor:
        scales = WeightScales(scale)
        rounded = scales.dequantize(rounding.round_nearest(weight, scales, qtype))
        return (weight - rounded).square().sum(1)

    full = weight.abs().amax(1) / qtype.qmax
    actual = rounding.search_scale(weight, qtype)
    assert bool((loss(actual) <= loss(full)).all())
    if qtype.bits == 4:
        assert bool((actual < full).any())


@pytest.mark.parametrize(
    ("qtype", "low", "high"), list(zip(TYPES, (-8, -8, -127, -63), (7, 7, 127, 63), strict=True))
)
def test_integers_fill_their_range(qtype: QType, low: int, high: int) -> None:
    integers = rounding.round_nearest(weights(4, 50) * 100, WeightScales(torch.ones(4)), qtype)
    assert (int(integers.min()), int(integers.max())) == (low, high)


@given(
    seed=st.integers(0, 99),
    bits=st.integers(2, 8),
    group=st.integers(0, 40),
    size=st.floats(1e-4, 1e4),
)
def test_a_reduced_range_never_saturates_sixteen_bits(
    seed: int, bits: int, group: int, size: float
) -> None:
    """Two products of uint8 and int8 are added in 16 bits on x86 without VNNI."""
    weight = torch.randn(4, 65, generator=torch.Generator().manual_seed(seed)) * size
    scheme = layer_scheme(bits, group=group)
    scales = rounding.search_scales(weight, scheme)
    wide = scales.widen(rounding.round_nearest(weight, scales, scheme.weight)).int()
    assert 2 * 255 * int(wide.max()) < 2**15
    assert 2 * 255 * int(wide.min()) >= -(2**15)


@pytest.mark.parametrize("group", [0, 32, 64])
def test_second_order_rounding_beats_nearest_on_its_inputs(group: int) -> None:
    x, weight = correlated(500, 150), weights(24, 150)
    hessian = x.T @ x / len(x)
    scheme = layer_scheme(4, group=group, reduce_range=False)
    scales = rounding.search_scales(weight, scheme, hessian.diagonal())
    nearest = rounding.round_nearest(weight, scales, INT4)
    second = rounding.round_gptq(weight, scales, INT4, hessian)
    assert output_error(x, weight, second, scales) < 0.6 * output_error(x, weight, nearest, scales)


def test_second_order_rounding_of_uncorrelated_inputs_is_nearest() -> None:
    weight = weights(8, 40)
    scales = rounding.search_scales(weight, CHANNELS)
    hessian = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(0.1).diag()
    actual = rounding.round_gptq(weight, scales, INT4, hessian)
    assert torch.equal(actual, rounding.round_nearest(weight, scales, INT4))


def test_a_singular_hessian_is_damped() -> None:
    x, weight = correlated(3, 60), weights(5, 60)
    x[:, :10] = 0
    scales = rounding.search_scales(weight, CHANNELS)
    integers = rounding.round_gptq(weight, scales, INT4, x.T @ x)
    assert output_error(x, weight, integers, scales) < float((weight @ x.T).square().mean())


def test_an_all_zero_channel_stays_zero() -> None:
    weight = weights(3, 20)
    weight[1] = 0
    for group in (0, 8):
        scheme = layer_scheme(4, group=group, reduce_range=False)
        scales = rounding.search_scales(weight, scheme)
        assert bool((scales.channel > 0).all())
        assert rounding.round_nearest(weight, scales, INT4)[1].abs().max() == 0


def test_bias_correction_takes_the_mean_error_away() -> None:
    x, weight = correlated(300, 30), weights(6, 30)
    scales = rounding.search_scales(weight, CHANNELS)
    values = scales.dequantize(rounding.round_nearest(weight, scales, INT4))
    shift = rounding.bias_correction(weight, values, x.mean(0))
    exact, rounded = x @ weight.T, x @ values.T + shift
    torch.testing.assert_close(rounded.mean(0), exact.mean(0), rtol=1e-4, atol=1e-4)


@given(
    inputs=st.integers(1, 100),
    group=st.integers(1, 120),
    reduce=st.booleans(),
    seed=st.integers(0, 99),
)
def test_groups_are_integers_within_their_channel(
    inputs: int, group: int, reduce: bool, seed: int
) -> None:
    scheme = layer_scheme(4, group=group, reduce_range=reduce)
    weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    scales = rounding.search_scales(weight, scheme)
    assert scales.group is not None
    assert scales.group.shape == (3, -(-inputs // group))
    assert 1 <= int(scales.group.min()) <= int(scales.group.max()) <= (8 if reduce else 16)
    integers = rounding.round_nearest(weight, scales, scheme.weight)
    wide = scales.widen(integers)
    assert wide.dtype == torch.int8
    torch.testing.assert_close(wide.float() * scales.channel[:, None], scales.dequantize(integers))


@example(seed=0, reduce=True, outliers=False)
@example(seed=0, reduce=True, outliers=True)
@given(seed=st.integers(0, 99), reduce=st.booleans(), outliers=st.booleans())
def test_multiples_of_groups_lose_no_more_than_the_nearest_to_their_best_scales(
    seed: int, reduce: bool, outliers: bool
) -> None:
    scheme = layer_scheme(4, group=16, reduce_range=reduce)
    g = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(6, 96, generator=g), torch.rand(96, generator=g) ** 3
    if outliers:
        weight *= torch.randn(6, 6, generator=g).exp().repeat_interleave(16, 1)

    def loss(scales: WeightScales) -> Tensor:
        rounded = scales.dequantize(rounding.round_nearest(weight, scales, scheme.weight))
        return ((weight - rounded).square() * importance).sum(1)

    best = rounding.search_scale(
        weight.reshape(-1, 16), scheme.weight, importance.reshape(-1, 16).repeat(6, 1)
    ).reshape(6, 6)
    channel = best.amax(1) / scheme.largest_group_scale
    multiples = (best / channel[:, None]).round().clamp(min=1).to(torch.uint8)
    nearest = loss(WeightScales(channel, multiples, 16))
    actual = loss(rounding.search_scales(weight, scheme, importance))
    assert bool((actual <= nearest * (1 + 1e-5)).all())
    if seed == 0:
        assert float(actual.sum()) < float(nearest.sum())


def test_groups_lose_less_than_channels() -> None:
    weight = weights(16, 256) * torch.logspace(-1, 0, 256)

    def loss(group: int) -> float:
        scheme = layer_scheme(4, group=group, reduce_range=False)
        scales = rounding.search_scales(weight, scheme)
        rounded = scales.dequantize(rounding.round_nearest(weight, scales, INT4))
        return float((weight - rounded).square().sum())

    assert loss(32) < 0.8 * loss(0)
