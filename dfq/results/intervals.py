"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2

_HALVINGS = 60
"""Bisection steps of an interval of length 1, up to the precision of a double."""

_STEPS = 100_000
"""Largest number of terms of a continued fraction; about the square root of the count is needed."""

_TINY = 1e-300
"""Substitute for 0 in Lentz's method."""


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share from ``count`` of ``total`` observations.

    Exact for binomial counts: C. J. Clopper and E. S. Pearson, Biometrika 26, 404 (1934).
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total} is no share")
    rest = total - count
    low, high = 0.0, 1.0
    if count == total:
        low = TAIL ** (1 / total)
    elif count:
        low = _root(lambda p: incomplete_beta(count, rest + 1, p) < TAIL)
    if not count:
        high = 1 - TAIL ** (1 / total)
    elif rest:
        high = _root(lambda p: incomplete_beta(count + 1, rest, p) < 1 - TAIL)
    return low, high


def images_to_decide(bound: float) -> int | None:
    """Return how many images, all of them correct, show a share of at least ``bound``; None if no
    number does."""
    if bound >= 1:
        return None
    if bound <= TAIL:
        return 1
    total = max(1, math.floor(math.log(TAIL) / math.log(bound)) - 1)
    while TAIL ** (1 / total) < bound:
        total += 1
    return total


def mean_interval(
    mean: float, deviation: float, count: int, limits: tuple[float, float]
) -> tuple[float, float]:
    """Return the 95 % interval of a mean by the normal distribution, clipped to ``limits``.

    ``deviation``: sample standard deviation, with divisor ``count - 1``.
    """
    if count < 2:
        return limits
    half_width = NormalDist().inv_cdf(1 - TAIL) * deviation / math.sqrt(count)
    return max(limits[0], mean - half_width), min(limits[1], mean + half_width)


def _root(is_below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b) for ``0 < x < 1``.

    By Lentz's evaluation of its continued fraction (DLMF 8.17.22).  I_p(k, n - k + 1) is the
    probability of at least k successes in n.
    """
    if x > (a + 1) / (a + b + 2):  # where the fraction of the complement converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logarithm + a * math.log(x) + b * math.log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for step in range(_STEPS):
        factor = _numerator(a, b, x, step)
        d = 1 / (1 + factor * d or _TINY)
        c = 1 + factor / c or _TINY
        value *= c * d
        if step and abs(c * d - 1) < 1e-14:
            break
    return front * (value - 1)


def _numerator(a: float, b: float, x: float, step: int) -> float:
    """Return a numerator of the continued fraction ``1 + 1 / (1 + ...``."""
    m = step // 2
    if step == 0:
        return 1.0
    if step % 2:
        return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
    return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
