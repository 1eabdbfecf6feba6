"""How float weights become integers: clipping by error, nearest and second-order rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.errors import RunError
from dfq.quantization.observers import channel_scale

CLIP_STEPS = 40
"""Candidates of the clipping search, from the full range downwards."""

CLIP_LOWEST = {4: 0.5, 8: 0.9}
"""The smallest clipping candidate, as a share of the largest magnitude."""

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (arXiv 2210.17323, 3.3)."""

COLUMNS = 128
"""Columns between two updates of the remaining weights (arXiv 2210.17323, 3.3)."""


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of symmetric weights: -7..7 or -127..127."""
    high = 2 ** (bits - 1) - 1
    return -high, high


def search_scale(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each output channel that minimises its squared rounding error.

    Args:
        weight: float32 ``[out, in]``.
        importance: weight of each input's error, ``[in]``; the mean square of the input
            makes it the error of the output, for uncorrelated inputs.

    Returns:
        float32 ``[out]``, above 0.
    """
    low, high = integer_range(bits)
    full = channel_scale(weight, high)
    weights = torch.ones_like(weight[0]) if importance is None else importance.clamp_min(1e-12)
    best = full
    least = torch.full_like(best, torch.inf)
    for share in torch.linspace(1.0, CLIP_LOWEST[bits], CLIP_STEPS).tolist():
        scale = full * share
        error = weight - (weight / scale[:, None]).round_().clamp_(low, high) * scale[:, None]
        loss = error.square_() @ weights
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def round_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 ``[out, in]`` nearest to ``weight / scale``, ties to even."""
    low, high = integer_range(bits)
    return (weight / scale[:, None]).round_().clamp_(low, high).to(torch.int8)


def round_gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Round column by column, each column's error made up for by those not yet rounded.

    GPTQ (arXiv 2210.17323, section 3): with the Cholesky factor of the inverse Hessian,
    in blocks of columns, the inputs of largest second moment first.

    Args:
        weight: float32 ``[out, in]``.
        scale: float32 ``[out]``.
        hessian: ``x x^T`` summed or averaged over inputs, float32 ``[in, in]``.

    Returns:
        int8 ``[out, in]``.
    """
    low, high = integer_range(bits)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    rest = weight[:, order].clone()
    factor = _inverse_factor(hessian[order][:, order])
    result = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, rest.shape[1], COLUMNS):
        end = min(start + COLUMNS, rest.shape[1])
        block, errors = rest[:, start:end], torch.empty_like(rest[:, start:end])
        for i in range(end - start):
            row = factor[start + i, start + i : end]
            rounded = (block[:, i] / scale).round_().clamp_(low, high)
            result[:, start + i] = rounded.to(torch.int8)
            errors[:, i] = (block[:, i] - rounded * scale) / row[0]
            block[:, i:] -= errors[:, i, None] * row
        rest[:, end:] -= errors @ factor[start:end, end:]
    return result[:, order.argsort()]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse.

    Damping grows until the matrix is numerically positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise RunError("Activations overflow on the calibration images; use other images.")
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    damping = DAMPING
    while True:
        damped = hessian.double() + torch.eye(
            len(hessian), dtype=torch.float64, device=hessian.device
        ) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10


def bias_correction(weight: Tensor, integers: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """What rounding takes from each output on average, ``[out]``; add it to the bias.

    Arxiv 1906.04721, section 4.2, with the input's mean from calibration.
    """
    return (weight - integers.float() * scale[:, None]) @ mean
