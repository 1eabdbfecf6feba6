"""Calibration: ranges and statistics of every quantized activation of the float model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfq.errors import DatasetError, RunError, SettingError
from dfq.quantization.observers import RangeObserver
from dfq.quantization.scheme import ATTENTION_INPUTS, Scheme, calibrated_activations, layers
from dfq.runtime.qtype import QParams
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Preprocessing, ViT
from dfq.vit.modules import merge_heads

MAX_ACTIVATION = 1e38
"""Largest magnitude of an activation; ranges of a few times as much overflow float32."""


class InputStatistics:
    """Running mean, range and, optionally, second moment of a linear layer's input.

    ``low`` and ``high`` are the minimum and maximum of each feature, float32 ``[in]``.
    """

    def __init__(self, features: int, *, second_moment: bool, device: torch.device) -> None:
        self.count = 0
        self.low = torch.full((features,), torch.inf, device=device)
        self.high = torch.full((features,), -torch.inf, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, features, device=device) if second_moment else None

    def observe(self, x: Tensor) -> None:
        """Update the statistics with inputs ``[..., in]``."""
        x = x.detach().float().flatten(0, -2)
        self.count += x.shape[0]
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._sum += x.sum(0, dtype=torch.float64)
        if self._squares is not None:
            self._squares.addmm_(x.T, x)

    def normalized(self, center: Tensor, scale: Tensor) -> InputStatistics:
        """Return the statistics of ``(x - center) / scale``; both are float32 ``[in]``."""
        result = copy.copy(self)
        result.low, result.high = (self.low - center) / scale, (self.high - center) / scale
        result._sum = (self._sum - self.count * center) / scale
        if self._squares is not None:
            center64 = center.double()
            cross = torch.outer(self._sum, center64)
            square = self.count * torch.outer(center64, center64)
            shifted = self._squares.double() - cross - cross.T + square
            shifted.diagonal().clamp_min_(0)
            result._squares = (shifted / torch.outer(scale, scale)).float()
        return result

    @property
    def max_abs(self) -> Tensor:
        """Largest magnitude of each feature, float32 ``[in]``; NaN if a value was NaN."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, float32 ``[in]``."""
        return (self._sum / max(1, self.count)).float()

    @property
    def hessian(self) -> Tensor | None:
        """Mean of ``x x^T``, float32 ``[in, in]``; half the Hessian of the layer's error."""
        return None if self._squares is None else self._squares / max(1, self.count)


@dataclass(frozen=True)
class Calibration:
    """Result of calibration.

    ``qparams``: of every calibrated activation.  ``statistics``: of every linear layer's input.
    ``attention_statistics``: of q, k and v, with 8-bit attention.
    """

    qparams: dict[str, QParams]
    statistics: dict[str, InputStatistics]
    images: int
    attention_statistics: dict[str, InputStatistics] = field(default_factory=dict)


@torch.no_grad()
def calibrate(
    vit: ViT,
    batches: Iterable[SparseImages],
    preprocessing: Preprocessing,
    scheme: Scheme,
    advance: Callable[[int], None] | None = None,
) -> Calibration:
    """Run sparse images through the float model and collect ranges and statistics.

    The model sees only the patches that are present, at their true positions.  The last block is
    observed on all tokens, including those that pooling does not read.  Memory does not grow with
    the number of images.  The callback ``advance`` gets the number of images of each batch.

    Raises:
        DatasetError: there are no images.
        RunError: an activation is NaN or infinite, or its square overflows.
    """
    arch, device = vit.arch, vit.prefix.device
    observers = {
        name: RangeObserver(scheme.activation_observer(name), scheme.activation_qtype(name))
        for name in calibrated_activations(arch, scheme)
    }
    statistics = {
        name: InputStatistics(
            _linear(vit, name).in_features,
            second_moment=scheme.for_layer(name).second_order,
            device=device,
        )
        for name in layers(arch)
    }
    handles = _observe_layers(vit, observers, statistics)
    attention_statistics: dict[str, InputStatistics] = {}
    if scheme.integer_attention:
        handles += _observe_attention(vit, observers, attention_statistics)
    images = 0
    try:
        for batch in batches:
            batch = batch.to(device)
            x = pixels_to_input(batch.patches, preprocessing, arch.grid)
            vit.classify(vit.tokens(x, batch.positions))
            images += len(batch)
            if advance is not None:
                advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise DatasetError("The calibration set holds no images.")
    for name, observed in statistics.items():
        _check_hessian(name, observed)
    qparams = {name: observer.calculate_qparams() for name, observer in observers.items()}
    return Calibration(qparams, statistics, images, attention_statistics)


def check_calibration(calibration: Calibration, vit: ViT, scheme: Scheme) -> None:
    """Raise :class:`SettingError` unless a calibration has all that ``scheme`` needs of ``vit``."""
    problem = _calibration_problem(calibration, vit, scheme)
    if problem is not None:
        raise SettingError(
            f"The calibration {problem}. Calibrate this model with the settings that it is "
            "quantized with."
        )


def _calibration_problem(calibration: Calibration, vit: ViT, scheme: Scheme) -> str | None:
    for name in calibrated_activations(vit.arch, scheme):
        if name not in calibration.qparams:
            return f"has no range of {name!r}"
        found, expected = calibration.qparams[name].qtype, scheme.activation_qtype(name)
        if found != expected:
            return f"has a range of {name!r} in {found}, where the settings say {expected}"
    for name in layers(vit.arch):
        observed, features = calibration.statistics.get(name), _linear(vit, name).in_features
        if observed is None:
            return f"has no statistics of {name!r}"
        if len(observed.low) != features:
            return f"is of {len(observed.low)} features at {name!r}, where the model has {features}"
        if scheme.for_layer(name).second_order and observed.hessian is None:
            return f"has no second moment of {name!r}, which its rounding needs"
    return None


def _check_range(what: str, observed: InputStatistics) -> None:
    """Raise :class:`RunError` if an activation is not finite, or too large for a range."""
    if not float(observed.max_abs.max()) <= MAX_ACTIVATION:
        raise RunError(
            f"The {what} is not finite on the calibration images, or beyond "
            f"{MAX_ACTIVATION:g}, so it has no range. Check the weights, or use other images."
        )


def _check_hessian(name: str, observed: InputStatistics) -> None:
    """Raise :class:`RunError` if the squares of a layer's input overflow float32."""
    if observed.hessian is not None and not bool(torch.isfinite(observed.hessian).all()):
        raise RunError(
            f"The input of {name!r} reaches {float(observed.max_abs.max()):.3g} on the calibration "
            "images, and its squares, which rounding by GPTQ needs, overflow. Check the weights, "
            'use other images, or set rounding = "nearest" in a recipe.'
        )


def _linear(vit: ViT, name: str) -> nn.Linear:
    layer = vit.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _observe_layers(
    vit: ViT, observers: dict[str, RangeObserver], statistics: dict[str, InputStatistics]
) -> list[Any]:
    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            statistics[name].observe(inputs[0])
            _check_range(f"input of {name!r}", statistics[name])
            if name in observers:
                observers[name].observe(inputs[0])

        return hook

    return [vit.get_submodule(name).register_forward_pre_hook(observe(name)) for name in statistics]


def _observe_attention(
    vit: ViT, observers: dict[str, RangeObserver], attention_statistics: dict[str, InputStatistics]
) -> list[Any]:
    width, device = vit.arch.attention_dim, vit.prefix.device

    def observe(prefix: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for suffix, values in zip(ATTENTION_INPUTS, inputs[:3], strict=True):
                name = f"{prefix}.{suffix}"
                attention_statistics[name].observe(merge_heads(values))
                _check_range(f"tensor {name!r} of attention", attention_statistics[name])
                observers[name].observe(values)

        return hook

    handles = []
    for i in range(vit.arch.depth):
        for suffix in ATTENTION_INPUTS:
            name = f"blocks.{i}.{suffix}"
            attention_statistics[name] = InputStatistics(width, second_moment=False, device=device)
        product = vit.block(i).attn.product
        handles.append(product.register_forward_pre_hook(observe(f"blocks.{i}")))
    return handles
