"""Histogram observer."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import SettingError
from dfq.quantization.histogram import BINS, Histogram
from dfq.quantization.observers import OURS, TORCH, RangeObserver
from dfq.recipe import Observer
from dfq.runtime.qtype import INT8, qparams_from_range


def heavy(count: int = 200_000) -> torch.Tensor:
    """Normal values, a few of them far out."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    values[:1] = 60.0
    return values


def error(values: torch.Tensor, observer: Observer) -> float:
    watch = RangeObserver(observer, INT8)
    watch.observe(values)
    qparams = watch.calculate_qparams()
    low, high = qparams.range
    rounded = (values / qparams.scale).round().mul(qparams.scale).clamp(low, high)
    return float((rounded - values).square().mean())


def test_every_observer_is_known_and_no_other() -> None:
    assert {*TORCH, *OURS} == {*get_args(Observer)}
    assert not {*TORCH} & {*OURS}
    unknown: Any = "entropy"
    with pytest.raises(SettingError, match=r"observer is 'entropy'; allowed: minmax, .*, mse"):
        RangeObserver(unknown)


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_outliers_do_not_set_the_range(observer: Observer) -> None:
    watch = RangeObserver(observer, INT8)
    watch.observe(heavy())
    assert 3 < watch.calculate_qparams().range[1] < 30


def test_least_error_is_least() -> None:
    values = heavy()
    assert error(values, "mse") < 1.02 * min(error(values, "minmax"), error(values, "percentile"))


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=5
    )
)
def test_nothing_is_lost_and_the_range_holds_all(parts: list[list[float]]) -> None:
    histogram = Histogram()
    for part in parts:
        histogram.observe(torch.tensor(part))
    values = [v for part in parts for v in part]
    low, high = histogram.min_max()
    assert int(histogram.counts.sum()) == len(values)
    width = 2 * histogram.limit / BINS
    assert low - width <= min(values)
    assert max(values) <= high + width
    assert high - low <= max(values) - min(values) + 2.01 * width


def test_memory_is_flat_while_the_range_grows() -> None:
    histogram = Histogram()
    for power in range(12):
        histogram.observe(
            torch.randn(1000, generator=torch.Generator().manual_seed(power)) * 2**power
        )
    assert histogram.counts.shape == (BINS,)
    assert int(histogram.counts.sum()) == 12_000


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_positive_values_have_zero_at_zero(observer: Observer) -> None:
    watch = RangeObserver(observer)
    watch.observe(torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    qparams = watch.calculate_qparams()
    assert qparams.zero_point == 0
    assert qparams.range[1] == pytest.approx(1, rel=0.02)


def test_constant_and_empty_inputs_give_quantizers() -> None:
    for observer in ("percentile", "mse"):
        watch = RangeObserver(observer)
        watch.observe(torch.empty(0))
        watch.observe(torch.zeros(10))
        assert watch.calculate_qparams().scale > 0
    assert qparams_from_range(0.0, 0.0, INT8).scale > 0
