"""Triton kernels beside the torch code that defines them, through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exported_models import layer_scheme
from torch import Tensor

from dfq.quantization import rounding
from dfq.runtime.qtype import QType

pytest.importorskip("triton")

from dfq.quantization import gptq_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT4 = QType(4, signed=True)
"""Where there is no GPU, conftest.py has the kernels interpreted."""


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    x = torch.randn(3 * columns, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    factor = rounding._inverse_factor(x.T @ x / len(x), 0.01)
    steps = 0.2 + torch.rand(rows, columns, generator=g)
    return weight.to(DEVICE), steps.to(DEVICE), factor.to(DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (5, 128), (37, 33), (1, 1)])
@pytest.mark.parametrize("qtype", [INT4, layer_scheme(8).weight], ids=str)
def test_rounding_by_kernel_is_that_of_the_loop(rows: int, columns: int, qtype: QType) -> None:
    weight, steps, factor = problem(rows, columns, seed=rows)
    integers, errors = gptq_kernel.round_columns(weight, steps, factor, qtype)
    expected = rounding.round_columns(weight.clone(), steps, factor, qtype)
    assert torch.equal(integers, expected[0])
    assert torch.equal(errors, expected[1])
    assert len(integers.unique()) > 1 or columns == 1


def test_ties_are_rounded_to_even_and_values_clamped() -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, -2.5, 7.5, 100.0, -100.0, -8.5]], device=DEVICE)
    integers, _ = gptq_kernel.round_columns(
        weight, torch.ones_like(weight), torch.eye(8, device=DEVICE), INT4
    )
    assert integers.tolist() == [[0, 2, 0, -2, 7, 7, -8, -8]]


def test_strided_blocks_are_rounded_in_place_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, _, _ = problem(6, 150, seed=1)
    x = torch.randn(400, 150, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    scales = rounding.search_scales(weight, layer_scheme(4))
    expected = rounding.round_gptq(weight, scales, INT4, x.T @ x)
    monkeypatch.setattr(rounding, "column_rounding", lambda _: gptq_kernel.round_columns)
    actual = rounding.round_gptq(weight, scales, INT4, x.T @ x)
    assert torch.equal(actual, expected)


def test_a_kernel_is_used_only_where_it_gives_what_the_loop_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure = rounding.triton_failure.__wrapped__
    monkeypatch.setattr(rounding, "has_triton", lambda _: True)
    monkeypatch.setattr(rounding, "BLOCK_COLUMNS", 8)
    assert failure(torch.device(DEVICE)) is None
    right = gptq_kernel.round_columns

    def other(*given: Any) -> tuple[Tensor, Tensor]:
        integers, errors = right(*given)
        return integers + 1, errors

    monkeypatch.setattr(gptq_kernel, "round_columns", other)
    assert "differ from the loop's" in str(failure(torch.device(DEVICE)))

    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gptq_kernel, "round_columns", broken)
    assert failure(torch.device(DEVICE)) == "RuntimeError: no compiler"
    assert rounding.column_rounding(torch.device("cpu")) is rounding.round_columns
