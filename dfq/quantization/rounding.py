"""How float weights become integers: scales by error, nearest and second-order rounding."""

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
from dfq.runtime.qtype import QType
from dfq.runtime.weights import apply_group_scale, expand_group_scale

CLIP_STEPS = 40
"""Candidates of the clipping search, from the full range downwards."""

SMALLEST = 1e-30
"""Least scale, so that a row of zeros has one."""

LEAST_IMPORTANCE = 1e-12
"""Of an input, as a share of the largest."""

COLUMNS = 128
"""Columns between two updates of the remaining weights (arXiv 2210.17323, 3.3)."""


@dataclass(frozen=True)
class WeightScales:
    """What a weight's integers stand for.

    ``channel`` float32 ``[out]``.  With ``group``, uint8 ``[out, ceil(in / size)]`` of values
    from 1 on, each run of ``size`` inputs has an integer scale of its own within its
    channel (QServe, arXiv 2405.04532, section 4.1): products run on ``integers * group`` as on
    any 8-bit weights of one scale per channel.
    """

    channel: Tensor
    group: Tensor | None = None
    size: int = 0

    def steps(self, inputs: int) -> Tensor:
        """The distance between two integers of each weight, float32 ``[out, in or 1]``."""
        if self.group is None:
            return self.channel[:, None]
        return self.channel[:, None] * expand_group_scale(self.group, self.size, inputs).float()

    def widen(self, integers: Tensor) -> Tensor:
        """The integers in units of the channel's scale, int8 ``[out, in]``."""
        return apply_group_scale(integers, self.group, self.size)

    def dequantize(self, integers: Tensor) -> Tensor:
        """The weights that the integers stand for, float32 ``[out, in]``."""
        return integers.float() * self.steps(integers.shape[1])


def search_scales(
    weight: Tensor, scheme: LayerScheme, importance: Tensor | None = None
) -> WeightScales:
    """Scales that minimise the weighted squared rounding error of ``weight`` ``[out, in]``.

    Where inputs share a second, integer scale, the scale that each group would like best is
    rounded to a share of its channel's largest: an integer over ``scheme.largest_group_scale``.
    ``importance`` as in :func:`search_scale`.
    """
    group, largest = scheme.group, scheme.largest_group_scale
    if not group:
        return WeightScales(search_scale(weight, scheme.weight, importance))
    outputs, inputs = weight.shape
    weights = torch.ones_like(weight[0]) if importance is None else importance
    padding = -inputs % group
    rows = F.pad(weight, (0, padding)).reshape(-1, group)
    shares = F.pad(weights, (0, padding)).reshape(1, -1, group).expand(outputs, -1, -1)
    wanted = search_scale(rows, scheme.weight, shares.reshape(-1, group)).reshape(outputs, -1)
    channel = wanted.amax(1) / largest
    levels = (wanted / channel[:, None]).round_().clamp_(1, largest)
    return WeightScales(channel, levels.to(torch.uint8), group)


def smallest_clip(bits: int) -> float:
    """Least share of the largest magnitude that a search for the scale tries."""
    return 0.5 if bits <= 4 else 0.9 if bits >= 7 else 0.7


def search_scale(weight: Tensor, qtype: QType, importance: Tensor | None = None) -> Tensor:
    """The scale of each output channel that minimises its squared rounding error.

    Args:
        weight: float32 ``[out, in]``.
        importance: weight of each input's error, ``[in]`` or ``[out, in]``; the mean square
            of the input makes it the error of the output, for uncorrelated inputs.

    Returns:
        float32 ``[out]``, above 0.
    """
    low, high = qtype.qmin, qtype.qmax
    largest = weight.abs().amax(1).clamp_min(SMALLEST)
    exponent = torch.frexp(largest).exponent  # squares of errors fit in float32 near 1
    weight, full = torch.ldexp(weight, -exponent[:, None]), torch.ldexp(largest, -exponent) / high
    weights = torch.ones_like(weight[0]) if importance is None else _comparable(importance)
    best = full
    least = torch.full_like(best, torch.inf)
    for share in torch.linspace(1.0, smallest_clip(qtype.bits), CLIP_STEPS).tolist():
        scale = full * share
        error = weight - (weight / scale[:, None]).round_().clamp_(low, high) * scale[:, None]
        loss = error.square_().mul_(weights).sum(1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return torch.ldexp(best, exponent)


def _comparable(importance: Tensor) -> Tensor:
    """Importances in units of about their largest, those of dead inputs raised to a little.

    The unit is a power of two, so that ratios stay as they are, bit for bit.
    """
    exponent = torch.frexp(importance.max()).exponent
    return torch.ldexp(importance, -exponent).clamp_min(LEAST_IMPORTANCE)


def round_nearest(weight: Tensor, scales: WeightScales, qtype: QType) -> Tensor:
    """int8 ``[out, in]`` nearest to the weights, ties to even."""
    steps = scales.steps(weight.shape[1])
    return (weight / steps).round_().clamp_(qtype.qmin, qtype.qmax).to(torch.int8)


def round_gptq(
    weight: Tensor,
    scales: WeightScales,
    qtype: QType,
    hessian: Tensor,
    damping: float = 0.01,
) -> Tensor:
    """Round column by column, each column's error made up for by those not yet rounded.

    GPTQ (arXiv 2210.17323, section 3): with the Cholesky factor of the inverse Hessian,
    in blocks of columns, the inputs of largest second moment first.

    Args:
        weight: float32 ``[out, in]``.
        scales: of the weight's integers; they stay as they are.
        hessian: ``x x^T`` summed or averaged over inputs, float32 ``[in, in]``.
        damping: added to the Hessian's diagonal, as a share of its mean; large values come
            close to rounding to the nearest.

    Returns:
        int8 ``[out, in]``.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    rest = weight[:, order].clone()
    steps = scales.steps(weight.shape[1]).expand_as(weight)[:, order]
    factor = _inverse_factor(hessian[order][:, order], damping)
    result = torch.empty_like(rest, dtype=torch.int8)
    round_block = fastest_columns(weight.device)
    for start in range(0, rest.shape[1], COLUMNS):
        end = min(start + COLUMNS, rest.shape[1])
        here = slice(start, end)
        result[:, here], errors = round_block(
            rest[:, here], steps[:, here], factor[here, here], qtype
        )
        rest[:, end:] -= errors @ factor[here, end:]
    return result[:, order.argsort()]


def round_columns(
    block: Tensor, steps: Tensor, factor: Tensor, qtype: QType
) -> tuple[Tensor, Tensor]:
    """Round a block of columns one by one, each error made up for by those after it.

    Args:
        block, steps: weights and distances of their integers, float32 ``[out, columns]``;
            ``block`` is used up.
        factor: upper triangular float32 ``[columns, columns]``.

    Returns:
        The integers, int8, and the errors over the factor's diagonal, float32, both
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


def fastest_columns(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """:func:`round_columns`, or the Triton kernel where it gives the same."""
    if kernel_failure(device) is not None:
        return round_columns
    from dfq.quantization import gptq_kernel

    return gptq_kernel.round_columns


@functools.cache
def kernel_failure(device: torch.device) -> str | None:
    """Why the Triton kernel is not used on a device; None where it is."""
    if not has_triton(device):
        return "no Triton here"
    try:
        from dfq.quantization import gptq_kernel

        weight = torch.linspace(-9, 9, 17 * COLUMNS, device=device).reshape(17, COLUMNS)
        factor = torch.full((COLUMNS, COLUMNS), 0.01, device=device).triu_() + torch.eye(
            COLUMNS, device=device
        )
        given = torch.ones_like(weight), factor, QType(4, signed=True)
        found = gptq_kernel.round_columns(weight, *given)
        same = all(map(torch.equal, found, round_columns(weight, *given)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's compiler has no list of what it raises
        return f"{type(error).__name__}: {error}"
    return None if same else "the kernel's integers are others than the loop's"


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse.

    Damping grows until the matrix is numerically positive definite.
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


def bias_correction(weight: Tensor, rounded: Tensor, mean: Tensor) -> Tensor:
    """What rounding takes from each output on average, ``[out]``; add it to the bias.

    Arxiv 1906.04721, section 4.2, with the input's mean from calibration; ``rounded`` are the
    weights that the integers stand for.
    """
    return (weight - rounded) @ mean
