"""GPTQ's loop over the columns of a block as one Triton kernel.

:func:`dfq.quantization.rounding.round_columns` is the reference; both give bitwise equal
results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq.runtime.qtype import QType

ROWS = 16
"""Output channels per Triton program."""

MAGIC = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds a small float32 to the nearest integer, ties to even."""


@triton.jit
def _round_columns(
    block_at,
    steps_at,
    factor_at,
    integers_at,
    errors_at,
    rows,
    columns,
    block_stride,
    steps_stride,
    factor_stride,
    integers_stride,
    errors_stride,
    low,
    high,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    block = tl.load(block_at + row[:, None] * block_stride + column[None, :], inside, 0.0)
    steps = tl.load(steps_at + row[:, None] * steps_stride + column[None, :], inside, 1.0)
    integers = tl.zeros((ROWS, COLUMNS), tl.float32)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(columns):
        here = (column == i)[None, :]
        value = tl.sum(tl.where(here, block, 0.0), 1)
        step = tl.sum(tl.where(here, steps, 0.0), 1)
        pivots = tl.load(
            factor_at + i * factor_stride + column, (column >= i) & (column < columns), 0.0
        )
        pivot = tl.load(factor_at + i * factor_stride + i)
        level = tl.minimum(tl.maximum(tl.div_rn(value, step), low), high)
        level = (level + MAGIC) - MAGIC
        error = tl.div_rn(value - level * step, tl.full((ROWS,), 1.0, tl.float32) * pivot)
        block = block - error[:, None] * pivots[None, :]
        integers = tl.where(here, level[:, None], integers)
        errors = tl.where(here, error[:, None], errors)
    tl.store(
        integers_at + row[:, None] * integers_stride + column[None, :],
        integers.to(tl.int8),
        inside,
    )
    tl.store(errors_at + row[:, None] * errors_stride + column[None, :], errors, inside)


def round_columns(
    block: Tensor, steps: Tensor, factor: Tensor, qtype: QType
) -> tuple[Tensor, Tensor]:
    """Triton implementation of :func:`dfq.quantization.rounding.round_columns`."""
    rows, columns = block.shape
    integers = torch.empty((rows, columns), dtype=torch.int8, device=block.device)
    errors = torch.empty((rows, columns), dtype=torch.float32, device=block.device)
    tensors = [x if x.stride(1) == 1 else x.contiguous() for x in (block, steps, factor)]
    with torch.cuda.device_of(block):
        _round_columns[(triton.cdiv(rows, ROWS),)](
            *tensors,
            integers,
            errors,
            rows,
            columns,
            *(x.stride(0) for x in (*tensors, integers, errors)),
            float(qtype.qmin),
            float(qtype.qmax),
            ROWS=ROWS,
            COLUMNS=triton.next_power_of_2(columns),
            enable_fp_fusion=False,
        )
    return integers, errors
