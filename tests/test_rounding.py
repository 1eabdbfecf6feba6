"""How float weights become integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.quantization import rounding


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=g)
    return torch.randn(samples, features, generator=g) @ mixing + 0.5


def weights(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def output_error(x: Tensor, weight: Tensor, integers: Tensor, scale: Tensor) -> float:
    return float(((weight - integers.float() * scale[:, None]) @ x.T).square().mean())


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scales_are_no_worse_than_the_full_range(bits: int) -> None:
    weight = weights(16, 200)
    weight[:, 0] *= 6
    high = 2 ** (bits - 1) - 1

    def loss(scale: Tensor) -> Tensor:
        rounded = rounding.round_nearest(weight, scale, bits).float() * scale[:, None]
        return (weight - rounded).square().sum(1)

    full = weight.abs().amax(1) / high
    found = rounding.search_scale(weight, bits)
    assert bool((loss(found) <= loss(full)).all())
    if bits == 4:
        assert bool((found < full).any())


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stay_symmetric(bits: int) -> None:
    low, high = rounding.integer_range(bits)
    integers = rounding.round_nearest(weights(4, 50) * 100, torch.ones(4), bits)
    assert (low, high) == (-high, high)
    assert int(integers.min()) == low
    assert int(integers.max()) == high


def test_second_order_rounding_beats_nearest_on_its_inputs() -> None:
    x, weight = correlated(500, 150), weights(24, 150)
    hessian = x.T @ x / len(x)
    scale = rounding.search_scale(weight, 4, hessian.diagonal())
    nearest = rounding.round_nearest(weight, scale, 4)
    second = rounding.round_gptq(weight, scale, 4, hessian)
    assert output_error(x, weight, second, scale) < 0.6 * output_error(x, weight, nearest, scale)


def test_second_order_rounding_of_uncorrelated_inputs_is_nearest() -> None:
    weight = weights(8, 40)
    scale = rounding.search_scale(weight, 4)
    hessian = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(0.1).diag()
    found = rounding.round_gptq(weight, scale, 4, hessian)
    assert torch.equal(found, rounding.round_nearest(weight, scale, 4))


def test_a_singular_hessian_is_damped() -> None:
    x, weight = correlated(3, 60), weights(5, 60)
    x[:, :10] = 0
    scale = rounding.search_scale(weight, 4)
    integers = rounding.round_gptq(weight, scale, 4, x.T @ x)
    assert int(integers.abs().max()) <= 7


def test_an_all_zero_channel_stays_zero() -> None:
    weight = weights(3, 20)
    weight[1] = 0
    scale = rounding.search_scale(weight, 4)
    assert bool((scale > 0).all())
    assert rounding.round_nearest(weight, scale, 4)[1].abs().max() == 0


def test_bias_correction_takes_the_mean_error_away() -> None:
    x, weight = correlated(300, 30), weights(6, 30)
    scale = rounding.search_scale(weight, 4)
    integers = rounding.round_nearest(weight, scale, 4)
    shift = rounding.bias_correction(weight, integers, scale, x.mean(0))
    exact, rounded = x @ weight.T, x @ (integers.float() * scale[:, None]).T + shift
    torch.testing.assert_close(rounded.mean(0), exact.mean(0), rtol=1e-4, atol=1e-4)
