"""Rates of this processor: matrix products of given shapes, and copies of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from calibration_bench.measure.counting import Product

BIG = 1536
"""Side of the square matrices of :func:`best_rate`."""


def seconds_of(call: Callable[[], object], budget: float) -> float:
    """Return the median seconds of a call, repeated for ``budget`` seconds, at least 3 times."""
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def product_seconds(products: Iterable[Product], dtype: torch.dtype, budget: float) -> float:
    """Return the total seconds of products, each at the speed of repeated calls of its shape.

    ``budget``: seconds spent on each distinct shape.
    """
    known: dict[object, float] = {}
    total = 0.0
    for product in products:
        shape = (product.m, product.k, product.n, product.batch, _layout(product))
        if shape not in known:
            known[shape] = seconds_of(_call(product, dtype), budget)
        total += product.count * known[shape]
    return total


def _layout(product: Product) -> str:
    """Whether the right factor is transposed in memory, as in a linear layer's forward pass."""
    if product.weight:
        return "plain" if product.backward else "transposed"
    return "transposed" if product.name in ("scores", "d scores") else "plain"


@torch.no_grad()
def _call(product: Product, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that computes the product of random values into allocated memory."""
    m, k, n, batch = product.m, product.k, product.n, product.batch
    left = torch.randn(batch, m, k).to(dtype)
    transposed = _layout(product) == "transposed"
    right = torch.randn(batch, *((n, k) if transposed else (k, n))).to(dtype)
    right = right.transpose(1, 2) if transposed else right
    out = torch.empty(batch, m, n, dtype=dtype)
    if batch == 1:
        return lambda: torch.mm(left[0], right[0], out=out[0])
    return lambda: torch.bmm(left, right, out=out)


def best_rate(dtype: torch.dtype, budget: float) -> float:
    """Return operations per second of products of large square matrices."""
    product = Product("square", BIG, BIG, BIG)
    return product.operations / seconds_of(_call(product, dtype), budget)


def copy_rate(budget: float) -> float:
    """Return bytes per second read and written by a copy much larger than the caches."""
    source = torch.zeros(64 * 2**20, dtype=torch.float32)
    target: Tensor = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), budget)
