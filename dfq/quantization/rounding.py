"""Quantization of weights: search for scales, rounding to nearest or by GPTQ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.device import has_triton
from dfq.errors import RunError
from dfq.quantization.scheme import LayerScheme
from dfq.runtime.qtype import MIN_SCALE, QType
from dfq.runtime.weights import apply_group_scale, expand_group_scale

CLIP_STEPS = 40
"""Candidate scales of the clipping search."""

CHANNEL_RATIOS, CHANNEL_STEPS = (0.86, 1.14), 9
"""Candidate scales of channels with groups, relative to the scale at which the widest group has its
best one."""

MIN_IMPORTANCE = 1e-12
"""Smallest importance of an input, relative to the largest."""

BLOCK_COLUMNS = 128
"""Columns between two updates of the remaining weights (arXiv 2210.17323, 3.3)."""


@dataclass(frozen=True)
class WeightScales:
    """Scales of a quantized weight, per channel or in two levels.

    ``channel``: float32 ``[out]``.  ``group``: uint8 ``[out, ceil(in / size)]``, at least 1, an
    integer scale of each group of ``size`` inputs relative to its channel's (QServe, arXiv
    2405.04532, section 4.1), so that ``integers * group`` are 8-bit weights with one scale per
    channel.
    """

    channel: Tensor
    group: Tensor | None = None
    size: int = 0

    def steps(self, inputs: int) -> Tensor:
        """Return the scale of each weight, float32 ``[out, in or 1]``."""
        if self.group is None:
            return self.channel[:, None]
        return self.channel[:, None] * expand_group_scale(self.group, self.size, inputs).float()

    def widen(self, integers: Tensor) -> Tensor:
        """Convert integers to units of the channel's scale, int8 ``[out, in]``."""
        return apply_group_scale(integers, self.group, self.size)

    def dequantize(self, integers: Tensor) -> Tensor:
        """Return the dequantized weights, float32 ``[out, in]``."""
        return integers.float() * self.steps(integers.shape[1])


def search_scales(
    weight: Tensor, scheme: LayerScheme, importance: Tensor | None = None
) -> WeightScales:
    """Search the scales that minimize the weighted squared rounding error of a weight.

    ``weight`` is float32 ``[out, in]``; ``importance`` as in :func:`search_scale`.  With groups,
    each has an integer multiple of its channel's scale: :func:`search_multiples`.
    """
    group = scheme.group
    if not group:
        return WeightScales(search_scale(weight, scheme.weight, importance))
    outputs, inputs = weight.shape
    weights = torch.ones_like(weight[0]) if importance is None else importance
    padding = -inputs % group
    rows = F.pad(weight, (0, padding)).reshape(-1, group)
    importances = F.pad(weights, (0, padding)).reshape(1, -1, group).expand(outputs, -1, -1)
    importances = importances.reshape(-1, group)
    best = search_scale(rows, scheme.weight, importances).reshape(outputs, -1)
    channel, multiples = search_multiples(
        rows.reshape(outputs, -1, group), best, scheme, importances.reshape(outputs, -1, group)
    )
    return WeightScales(channel, multiples.to(torch.uint8), group)


def search_multiples(
    weight: Tensor, best: Tensor, scheme: LayerScheme, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Search the scale of each channel and the integer multiples of it that its groups take.

    Of :data:`CHANNEL_STEPS` scales around that which gives the widest group its best scale, a
    channel takes the one with the least error, each group with the better of the two multiples
    next to its best scale.

    Args:
        weight, importance: float32 ``[out, groups, group]``.
        best: each group's best scale by itself, float32 ``[out, groups]``.

    Returns:
        float32 ``[out]``, and whole numbers from 1 to ``scheme.largest_group_scale``, float32
        ``[out, groups]``.
    """
    largest, exponent = scheme.largest_group_scale, _exponent(weight.abs().amax((1, 2)))
    weight = torch.ldexp(weight, -exponent[:, None, None])
    best = torch.ldexp(best, -exponent[:, None])
    importance = _normalize_importance(importance)
    full = best.amax(1) / largest
    channel, multiples = full, torch.ones_like(best)
    least = torch.full_like(full, torch.inf)
    for ratio in torch.linspace(*CHANNEL_RATIOS, CHANNEL_STEPS).tolist():
        scale = full * ratio
        below = (best / scale[:, None]).floor_().clamp_(1, largest)
        above = (below + 1).clamp_(max=largest)
        losses = [
            _losses(weight, multiple * scale[:, None], scheme.weight, importance)
            for multiple in (below, above)
        ]
        chosen = torch.where(losses[1] < losses[0], above, below)
        loss = torch.minimum(*losses).sum(1)
        better = loss < least
        channel, least = torch.where(better, scale, channel), torch.where(better, loss, least)
        multiples = torch.where(better[:, None], chosen, multiples)
    return torch.ldexp(channel, exponent), multiples


def _losses(weight: Tensor, scale: Tensor, qtype: QType, importance: Tensor) -> Tensor:
    """Weighted squared rounding error, summed over the last dimension, of ``[..., n]`` weights
    with a scale each ``[...]``."""
    scale = scale[..., None]
    error = weight - (weight / scale).round_().clamp_(qtype.qmin, qtype.qmax).mul_(scale)
    return error.square_().mul_(importance).sum(-1)


def _exponent(x: Tensor) -> Tensor:
    """Exponents by which magnitudes are divided so that squares of errors fit in float32."""
    return torch.frexp(x.clamp_min(MIN_SCALE)).exponent


def min_clip_ratio(bits: int) -> float:
    """Return the smallest clipping threshold to try, relative to the largest magnitude."""
    return 0.5 if bits <= 4 else 0.9 if bits >= 7 else 0.7


def search_scale(weight: Tensor, qtype: QType, importance: Tensor | None = None) -> Tensor:
    """Search the scale of each output channel that minimizes its squared rounding error.

    Args:
        weight: float32 ``[out, in]``.
        importance: weight of each input's error, ``[in]`` or ``[out, in]``; the mean square
            of the input makes it the error of the output, for uncorrelated inputs.

    Returns:
        float32 ``[out]``, above 0.
    """
    largest = weight.abs().amax(1).clamp_min(MIN_SCALE)
    exponent = _exponent(largest)
    weight = torch.ldexp(weight, -exponent[:, None])
    full_scale = torch.ldexp(largest, -exponent) / qtype.qmax
    weights = (
        torch.ones_like(weight[0]) if importance is None else _normalize_importance(importance)
    )
    best = full_scale
    least_loss = torch.full_like(best, torch.inf)
    for ratio in torch.linspace(1.0, min_clip_ratio(qtype.bits), CLIP_STEPS).tolist():
        scale = full_scale * ratio
        loss = _losses(weight, scale, qtype, weights)
        better = loss < least_loss
        best = torch.where(better, scale, best)
        least_loss = torch.where(better, loss, least_loss)
    return torch.ldexp(best, exponent)


def _normalize_importance(importance: Tensor) -> Tensor:
    """Scale importances to about 1 and clamp those of dead inputs to :data:`MIN_IMPORTANCE`.

    The factor is a power of two, which keeps ratios exact.
    """
    exponent = torch.frexp(importance.max()).exponent
    return torch.ldexp(importance, -exponent).clamp_min(MIN_IMPORTANCE)


def round_nearest(weight: Tensor, scales: WeightScales, qtype: QType) -> Tensor:
    """Round to nearest, ties to even: int8 ``[out, in]``."""
    steps = scales.steps(weight.shape[1])
    return (weight / steps).round_().clamp_(qtype.qmin, qtype.qmax).to(torch.int8)


def round_gptq(
    weight: Tensor,
    scales: WeightScales,
    qtype: QType,
    hessian: Tensor,
    damping: float = 0.01,
) -> Tensor:
    """Round by GPTQ (arXiv 2210.17323, section 3).

    Columns are rounded one by one, inputs of largest second moment first; the columns that remain
    compensate each error, by the Cholesky factor of the inverse Hessian.

    Args:
        weight: float32 ``[out, in]``.
        scales: scales of the weight, which are not changed.
        hessian: sum or mean of ``x x^T`` over inputs, float32 ``[in, in]``.
        damping: value added to the Hessian's diagonal, relative to its mean; large values
            approach rounding to nearest.

    Returns:
        int8 ``[out, in]``.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    rest = weight[:, order].clone()
    steps = scales.steps(weight.shape[1]).expand_as(weight)[:, order]
    factor = _inverse_factor(hessian[order][:, order], damping)
    result = torch.empty_like(rest, dtype=torch.int8)
    round_block = column_rounding(weight.device)
    for start in range(0, rest.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, rest.shape[1])
        here = slice(start, end)
        result[:, here], errors = round_block(
            rest[:, here], steps[:, here], factor[here, here], qtype
        )
        rest[:, end:] -= errors @ factor[here, end:]
    return result[:, order.argsort()]


def round_columns(
    block: Tensor, steps: Tensor, factor: Tensor, qtype: QType
) -> tuple[Tensor, Tensor]:
    """Round a block of columns one by one; later columns compensate each error.

    Args:
        block, steps: weights and their scales, float32 ``[out, columns]``; ``block`` is
            overwritten.
        factor: upper triangular float32 ``[columns, columns]``.

    Returns:
        The integers, int8, and the errors divided by the factor's diagonal, float32, both
        ``[out, columns]``.
    """
    integers, errors = torch.empty_like(block, dtype=torch.int8), torch.empty_like(block)
    for i in range(block.shape[1]):
        row, step = factor[i, i:], steps[:, i]
        rounded = (block[:, i] / step).round_().clamp_(qtype.qmin, qtype.qmax)
        integers[:, i] = rounded.to(torch.int8)
        errors[:, i] = (block[:, i] - rounded * step) / row[0]
        block[:, i:] -= errors[:, i, None] * row
    return integers, errors


def column_rounding(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the Triton kernel if it works on the device, else :func:`round_columns`."""
    if triton_failure(device) is not None:
        return round_columns
    from dfq.quantization import gptq_kernel

    return gptq_kernel.round_columns


@functools.cache
def triton_failure(device: torch.device) -> str | None:
    """Return why the Triton kernel is not used on a device, or None if it is."""
    if not has_triton(device):
        return "no Triton here"
    try:
        from dfq.quantization import gptq_kernel

        weight = torch.linspace(-9, 9, 17 * BLOCK_COLUMNS, device=device).reshape(17, BLOCK_COLUMNS)
        factor = torch.full(
            (BLOCK_COLUMNS, BLOCK_COLUMNS), 0.01, device=device
        ).triu_() + torch.eye(BLOCK_COLUMNS, device=device)
        given = torch.ones_like(weight), factor, QType(4, signed=True)
        from_kernel = gptq_kernel.round_columns(weight, *given)
        same = all(map(torch.equal, from_kernel, round_columns(weight, *given)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's compiler has no list of what it raises
        return f"{type(error).__name__}: {error}"
    return None if same else "the kernel's integers differ from the loop's"


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse.

    The damping is increased until the matrix is numerically positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise RunError("Activations overflow on the calibration images; use other images.")
    mean = hessian.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)
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


def bias_correction(weight: Tensor, dequantized: Tensor, mean: Tensor) -> Tensor:
    """Return the mean error of each output due to rounding, ``[out]``, to be added to the bias.

    arXiv 1906.04721, section 4.2, with the mean input ``mean`` ``[in]`` from calibration.
    """
    return (weight - dequantized) @ mean
