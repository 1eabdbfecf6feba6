"""Two Triton kernels for the work of an iteration before and after the model.

Together they compute what :class:`dfq.inversion.iteration.EagerUpdate` computes: jitter, total
variation, Adam and the bounds of pixels.  A program handles one patch of one image.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dfq.sparse import Grid


@triton.jit
def _neighbor(
    source,
    slots,
    first_patch,
    row,
    column,
    channel,
    y,
    x,
    inside,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Load the pixel at an offset from each, and whether it is in a live patch."""
    below, beside = y + DOWN, x + RIGHT
    next_row = row + tl.where(below >= HEIGHT, 1, 0) - tl.where(below < 0, 1, 0)
    next_column = column + tl.where(beside >= WIDTH, 1, 0) - tl.where(beside < 0, 1, 0)
    there = inside & (next_row >= 0) & (next_row < ROWS)
    there = there & (next_column >= 0) & (next_column < COLUMNS)
    slot = tl.load(slots + next_row * COLUMNS + next_column, there, -1)
    there = there & (slot >= 0)
    below, beside = (below + HEIGHT) % HEIGHT, (beside + WIDTH) % WIDTH
    pixel = (channel * HEIGHT + below) * WIDTH + beside
    patch = first_patch + slot
    value = tl.load(source + patch * (CHANNELS * HEIGHT * WIDTH) + pixel, there, 0.0)
    return value, there


@triton.jit(do_not_specialize=["live"])
def _enter(
    patches,
    positions,
    slots,
    table,
    mirrored,
    at,
    snapshot,
    inputs,
    moved_positions,
    squares,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    values: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    patch = tl.program_id(0).to(tl.int64)
    image = patch // live
    index = tl.arange(0, BLOCK)
    inside = index < values
    x, y = index % WIDTH, index // WIDTH % HEIGHT
    channel = index // (WIDTH * HEIGHT)
    step = tl.load(at)
    position = tl.load(positions + patch)
    tl.store(moved_positions + patch, tl.load(table + step * (ROWS * COLUMNS) + position))

    value = tl.load(patches + patch * values + index, inside, 0.0)
    tl.store(snapshot + patch * values + index, value, inside)
    flip = tl.load(mirrored + step) != 0
    target = tl.where(flip, index - x + WIDTH - 1 - x, index)
    tl.store(inputs + patch * values + target, value.to(inputs.dtype.element_ty), inside)

    row, column = position // COLUMNS, position % COLUMNS
    for k in tl.static_range(4):
        other, there = _neighbor(
            patches,
            slots + image * (ROWS * COLUMNS),
            image * live,
            row,
            column,
            channel,
            y,
            x,
            inside,
            0 if k == 0 else 1,
            0 if k == 1 else (-1 if k == 3 else 1),
            ROWS,
            COLUMNS,
            CHANNELS,
            HEIGHT,
            WIDTH,
        )
        difference = tl.where(there, value - other, 0.0)
        tl.store(squares + patch * 4 + k, tl.sum(difference * difference, 0))


@triton.jit(do_not_specialize=["live"])
def _descend(
    snapshot,
    positions,
    slots,
    mirrored,
    corrections,
    at,
    squares,
    gradient,
    low,
    high,
    patches,
    first,
    second,
    live,
    tv,
    gain1,
    beta2,
    gain2,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PATCHES: tl.constexpr,
):
    values: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    patch = tl.program_id(0).to(tl.int64)
    image = patch // live
    index = tl.arange(0, BLOCK)
    inside = index < values
    x, y = index % WIDTH, index // WIDTH % HEIGHT
    channel = index // (WIDTH * HEIGHT)
    step = tl.load(at)
    position = tl.load(positions + patch)
    row, column = position // COLUMNS, position % COLUMNS
    value = tl.load(snapshot + patch * values + index, inside, 0.0)

    of_image = tl.arange(0, PATCHES)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(4):
        parts = tl.load(squares + (image * live + of_image) * 4 + k, of_image < live, 0.0)
        norm = tl.maximum(tl.sqrt(tl.sum(parts, 0)), 1e-8)
        pull = tl.zeros((BLOCK,), tl.float32)
        for sign in tl.static_range(-1, 2, 2):
            other, there = _neighbor(
                snapshot,
                slots + image * (ROWS * COLUMNS),
                image * live,
                row,
                column,
                channel,
                y,
                x,
                inside,
                0 if k == 0 else sign,
                0 if k == 1 else (-sign if k == 3 else sign),
                ROWS,
                COLUMNS,
                CHANNELS,
                HEIGHT,
                WIDTH,
            )
            pull += tl.where(there, value - other, 0.0)
        total += pull / norm

    flip = tl.load(mirrored + step) != 0
    source = tl.where(flip, index - x + WIDTH - 1 - x, index)
    slope = tl.load(gradient + patch * values + source, inside, 0.0).to(tl.float32)
    total = total * tv + slope

    here = patch * values + index
    mean = tl.load(first + here, inside, 0.0)
    mean = mean + gain1 * (total - mean)
    square = tl.load(second + here, inside, 0.0) * beta2 + gain2 * total * total
    rate, spread = tl.load(corrections + step * 2), tl.load(corrections + step * 2 + 1)
    value = value - rate * mean / (tl.sqrt(square) / spread + eps)
    least, largest = tl.load(low + index, inside, 0.0), tl.load(high + index, inside, 0.0)
    value = tl.maximum(value, least, propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(value, largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(first + here, mean, inside)
    tl.store(second + here, square, inside)
    tl.store(patches + here, value, inside)


def enter(
    grid: Grid,
    patches: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    mirrored: Tensor,
    at: Tensor,
    snapshot: Tensor,
    inputs: Tensor,
    moved_positions: Tensor,
    squares: Tensor,
) -> None:
    """Write the model's input, a copy of the patches, and sums of squared differences.

    Args:
        patches, positions: float32 ``[B, L, D]`` and int64 ``[B, L]``.
        slots: int32 ``[B, N]``, the index in ``L`` of each position, or -1.
        table, mirrored: moves int64 ``[n, N]`` and bool ``[n]``.
        at: int64 ``[1]``, index of the next move.
        snapshot, inputs, moved_positions: written; as ``patches``, the model's type, as
            ``positions``.
        squares: written; float32 ``[B, L, 4]``.
    """
    batch, live = positions.shape
    _enter[(batch * live,)](
        *(patches, positions, slots, table, mirrored, at),
        *(snapshot, inputs, moved_positions, squares, live),
        **_shape(grid),
    )


def descend(
    grid: Grid,
    snapshot: Tensor,
    positions: Tensor,
    slots: Tensor,
    mirrored: Tensor,
    corrections: Tensor,
    at: Tensor,
    squares: Tensor,
    gradient: Tensor,
    low: Tensor,
    high: Tensor,
    patches: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    tv: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Add the gradient of total variation, take a step of Adam and clamp.

    ``corrections`` float32 ``[n, 2]`` are Adam's rate and the square root of its second
    correction; ``gradient`` that of :func:`enter`'s ``inputs``; ``patches``, ``first`` and
    ``second`` are changed.
    """
    batch, live = positions.shape
    _descend[(batch * live,)](
        *(snapshot, positions, slots, mirrored, corrections, at, squares, gradient),
        *(low, high, patches, first, second),
        *(live, tv, 1 - beta1, beta2, 1 - beta2, eps),
        **_shape(grid),
        PATCHES=triton.next_power_of_2(grid.patches),
    )


def _shape(grid: Grid) -> dict[str, int]:
    height, width = grid.patch_size
    return {
        "ROWS": grid.rows,
        "COLUMNS": grid.columns,
        "CHANNELS": grid.channels,
        "HEIGHT": height,
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(grid.patch_values),
    }
