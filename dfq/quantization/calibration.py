"""Calibration: sparse images through the float model, watched at every quantized site."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfq.errors import DatasetError, RunError
from dfq.quantization.observers import RangeObserver
from dfq.quantization.scheme import ATTENTION_SITES, Scheme, layers, range_sites
from dfq.runtime.qtype import QParams
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Preprocessing, ViT
from dfq.vit.modules import merge_heads

LARGEST = 1e38
"""Of activations; ranges of a few times as much are beyond float32."""


class InputStatistics:
    """Running mean, range and, on request, second moment of a linear layer's input.

    ``low`` and ``high`` are float32 ``[in]``, the smallest and largest value of each feature.
    """

    def __init__(self, features: int, *, second_moment: bool, device: torch.device) -> None:
        self.count = 0
        self.low = torch.full((features,), torch.inf, device=device)
        self.high = torch.full((features,), -torch.inf, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, features, device=device) if second_moment else None

    def observe(self, x: Tensor) -> None:
        """Take inputs ``[..., in]`` into account."""
        x = x.detach().float().flatten(0, -2)
        self.count += x.shape[0]
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._sum += x.sum(0, dtype=torch.float64)
        if self._squares is not None:
            self._squares.addmm_(x.T, x)

    def moved(self, middle: Tensor, ratio: Tensor) -> InputStatistics:
        """Those of ``(x - middle) / ratio``, feature by feature."""
        found = copy.copy(self)
        found.low, found.high = (self.low - middle) / ratio, (self.high - middle) / ratio
        found._sum = (self._sum - self.count * middle) / ratio
        if self._squares is not None:
            centre = middle.double()
            cross = torch.outer(self._sum, centre)
            square = self.count * torch.outer(centre, centre)
            shifted = self._squares.double() - cross - cross.T + square
            shifted.diagonal().clamp_min_(0)
            found._squares = (shifted / torch.outer(ratio, ratio)).float()
        return found

    @property
    def reach(self) -> Tensor:
        """The largest magnitude of each feature, float32 ``[in]``; NaN where there was one."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean(self) -> Tensor:
        """float32 ``[in]``."""
        return (self._sum / max(1, self.count)).float()

    @property
    def hessian(self) -> Tensor | None:
        """Mean of ``x x^T``, float32 ``[in, in]``; half the Hessian of the layer's error."""
        return None if self._squares is None else self._squares / max(1, self.count)


@dataclass(frozen=True)
class Calibration:
    """What calibration found: a quantizer for every site, statistics for every layer.

    ``heads`` are ranges by channel of the attention sites, with 8-bit attention.
    """

    quantizers: dict[str, QParams]
    statistics: dict[str, InputStatistics]
    images: int
    heads: dict[str, InputStatistics] = field(default_factory=dict)


@torch.no_grad()
def calibrate(
    vit: ViT,
    batches: Iterable[SparseImages],
    preprocessing: Preprocessing,
    scheme: Scheme,
    advance: Callable[[int], None] | None = None,
) -> Calibration:
    """Run sparse images through the float model and collect ranges and statistics.

    Patches keep their true positions; absent patches are absent, never black.  All tokens
    of the last block are seen, also those that no pooling reads.  Memory
    does not grow with the number of images.  ``advance`` is called with the number of
    images after every batch.

    Raises:
        DatasetError: there are no images.
        RunError: an activation is infinite or not a number, or so large that its square is.
    """
    arch, device = vit.arch, vit.prefix.device
    observers = {
        site: RangeObserver(scheme.observer_of(site), scheme.input_of(site))
        for site in range_sites(arch, scheme)
    }
    statistics = {
        name: InputStatistics(
            _linear(vit, name).in_features,
            second_moment=scheme.for_layer(name).second_order,
            device=device,
        )
        for name in layers(arch)
    }
    handles = _watch_layers(vit, observers, statistics)
    heads: dict[str, InputStatistics] = {}
    if scheme.integer_attention:
        handles += _watch_attention(vit, observers, heads)
    images = 0
    try:
        for batch in batches:
            moved = batch.to(device)
            x = pixels_to_input(moved.patches, preprocessing, arch.grid)
            vit.classify(vit.tokens(x, moved.positions))
            images += len(batch)
            if advance is not None:
                advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise DatasetError("The calibration set holds no images.")
    for name, found in statistics.items():
        _check_hessian(name, found)
    quantizers = {site: observer.quantizer() for site, observer in observers.items()}
    return Calibration(quantizers, statistics, images, heads)


def _check_range(site: str, found: InputStatistics) -> None:
    """Raise :class:`RunError` if what was observed at a site has no range."""
    if not float(found.reach.max()) <= LARGEST:
        raise RunError(
            f"The {site} is not finite on the calibration images, or beyond {LARGEST:g}, so it has "
            "no range. Check the weights, or use other images."
        )


def _check_hessian(name: str, found: InputStatistics) -> None:
    """Raise :class:`RunError` if squares of a layer's input are beyond float32."""
    if found.hessian is not None and not bool(torch.isfinite(found.hessian).all()):
        raise RunError(
            f"The input of {name!r} reaches {float(found.reach.max()):.3g} on the calibration "
            "images, and its squares, which rounding by GPTQ needs, overflow. Check the weights, "
            'use other images, or set rounding = "nearest" in a recipe.'
        )


def _linear(vit: ViT, name: str) -> nn.Linear:
    layer = vit.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _watch_layers(
    vit: ViT, observers: dict[str, RangeObserver], statistics: dict[str, InputStatistics]
) -> list[Any]:
    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            statistics[name].observe(inputs[0])
            _check_range(f"input of {name!r}", statistics[name])
            if name in observers:
                observers[name].observe(inputs[0])

        return hook

    return [vit.get_submodule(name).register_forward_pre_hook(watch(name)) for name in statistics]


def _watch_attention(
    vit: ViT, observers: dict[str, RangeObserver], heads: dict[str, InputStatistics]
) -> list[Any]:
    width, device = vit.arch.attention_dim, vit.prefix.device

    def watch(prefix: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for name, values in zip(ATTENTION_SITES, inputs[:3], strict=True):
                site = f"{prefix}.{name}"
                heads[site].observe(merge_heads(values))
                _check_range(f"tensor {site!r} of attention", heads[site])
                observers[site].observe(values)

        return hook

    handles = []
    for i in range(vit.arch.depth):
        for name in ATTENTION_SITES:
            site = f"blocks.{i}.{name}"
            heads[site] = InputStatistics(width, second_moment=False, device=device)
        product = vit.block(i).attn.product
        handles.append(product.register_forward_pre_hook(watch(f"blocks.{i}")))
    return handles
