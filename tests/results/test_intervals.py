"""Intervals of confidence, beside published values and sums of exact terms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfq.results.intervals import images_to_decide, incomplete_beta, mean_interval, share_interval


def tail(k: int, n: int, p: float) -> float:
    """Probability of at least ``k`` successes in ``n``, term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@given(n=st.integers(1, 300), data=st.data(), p=st.floats(0.001, 0.999))
def test_the_incomplete_beta_function_is_a_binomial_tail(
    n: int, data: st.DataObject, p: float
) -> None:
    k = data.draw(st.integers(1, n))
    assert incomplete_beta(k, n - k + 1, p) == pytest.approx(tail(k, n, p), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [  # scipy.stats.binomtest(count, total).proportion_ci(method="exact")
        (15, 16, 0.6976793, 0.9984189),
        (0, 10, 0.0, 0.3084971),
        (10, 10, 0.6915029, 1.0),
        (1, 1, 0.025, 1.0),
        (5, 10, 0.1870860, 0.8129140),
        (81, 263, 0.2527367, 0.3676219),
    ],
)
def test_intervals_of_shares_are_those_of_scipy(
    count: int, total: int, low: float, high: float
) -> None:
    assert share_interval(count, total) == pytest.approx((low, high), abs=2e-7)


@given(total=st.integers(1, 200), data=st.data())
def test_the_ends_of_an_interval_leave_two_and_a_half_percent(
    total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, total))
    low, high = share_interval(count, total)
    assert low <= count / total <= high
    if count:
        assert tail(count, total, low) == pytest.approx(0.025, rel=1e-6)
    if count < total:
        assert 1 - tail(count + 1, total, high) == pytest.approx(0.025, rel=1e-6)


@given(total=st.integers(1, 10**6))
def test_intervals_of_all_and_of_none_have_closed_forms(total: int) -> None:
    root = 0.025 ** (1 / total)
    assert share_interval(total, total) == pytest.approx((root, 1.0), rel=1e-12)
    assert share_interval(0, total) == pytest.approx((0.0, 1 - root), abs=1e-12)


@given(total=st.integers(1, 5000), data=st.data())
def test_intervals_of_a_share_and_of_its_rest_mirror_each_other(
    total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, total))
    low, high = share_interval(count, total)
    assert share_interval(total - count, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    if count < total:
        more = share_interval(count + 1, total)
        assert low < more[0]
        assert high <= more[1]


def test_large_numbers_come_near_to_the_normal_interval() -> None:
    low, high = share_interval(49_000, 50_000)
    reach = 1.959964 * math.sqrt(0.98 * 0.02 / 50_000)
    assert (0.98 - low, high - 0.98) == pytest.approx((reach, reach), rel=0.05)


@pytest.mark.parametrize(("count", "total"), [(-1, 2), (3, 2), (0, 0)])
def test_what_is_no_share_has_no_interval(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        share_interval(count, total)


@pytest.mark.parametrize(
    ("bound", "images"), [(0.0, 1), (0.02, 1), (0.5, 6), (0.9, 36), (0.98, 183), (1.0, None)]
)
def test_so_many_images_decide_a_bound(bound: float, images: int | None) -> None:
    assert images_to_decide(bound) == images


@given(bound=st.floats(0.03, 0.9999))
def test_one_image_less_does_not_decide_it(bound: float) -> None:
    images = images_to_decide(bound)
    assert images is not None
    assert share_interval(images, images)[0] >= bound
    assert images == 1 or share_interval(images - 1, images - 1)[0] < bound


def test_the_interval_of_a_mean_is_the_normal_one_within_its_limits() -> None:
    low, high = mean_interval(0.9, 0.1, 100, (-1.0, 1.0))
    assert (low, high) == pytest.approx((0.9 - 0.0195996, 0.9 + 0.0195996))
    assert mean_interval(0.99, 0.1, 4, (-1.0, 1.0))[1] == 1.0
    assert mean_interval(0.99, 0.0, 1, (-1.0, 1.0)) == (-1.0, 1.0)
