"""Registry of backends (sets of integer kernels), the preferred one first."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor, nn

from dfq.argument_names import option
from dfq.errors import SettingError, nearest
from dfq.runtime import float_gemm, int_mm, onednn, reference
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat
from dfq.runtime.qtype import QParams


class Backend(Protocol):
    """Interface of a backend; :mod:`dfq.runtime.reference` defines the arithmetic."""

    NAME: str

    def unsupported_reason(self, device: torch.device, needs: KernelRequirements) -> str | None:
        """Return why the kernels are not exact on a device, or None if they are."""

    def slow_reason(self, device: torch.device, needs: KernelRequirements) -> str | None:
        """Return why a backend that comes later is faster on a device, or None: then this one is
        selected where it is exact."""

    def linear_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype in which linear layers multiply integers on a device."""

    def attention_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype in which attention multiplies integers on a device."""

    def max_tile_scores(self, device: torch.device) -> int:
        """Return how many attention scores, over all images and heads, a tile should have."""

    def prepack(self, params: LinearParams) -> object:
        """Convert a layer's weights to the backend's own layout; called once per layer."""

    def linear(
        self,
        x: Tensor,
        params: LinearParams,
        packed: object,
        out: OutputFormat,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Integer linear layer: uint8 ``[..., in]`` to ``[..., out]`` as ``out`` says.

        ``residual`` is added to float32 output and may be overwritten.
        """

    def quantize(
        self, x: Tensor, qparams: QParams, affine: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Quantize float ``[..., in]``, or ``x * affine[0] + affine[1]``, to uint8, or to int8 for
        a signed type."""

    def prepack_norm(self, norm: nn.LayerNorm, qparams: QParams) -> object:
        """Convert a layer norm and the qparams of its output to the backend's own form; called
        once per norm."""

    def quantize_norm(self, x: Tensor, packed: object) -> Tensor:
        """Apply a layer norm to float ``[..., C]`` and quantize to uint8."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        """Attention of int8 ``[B, H, T, D]`` each; returns float ``[B, H, T, D]`` in units of
        ``v``."""


ANY_WEIGHT = KernelRequirements()

_backends: list[Backend] = [onednn, int_mm, float_gemm, reference]


def register(backend: Backend, *, preferred: bool = False) -> None:
    """Register a backend, which then runs where it is asked for by name.

    ``preferred``: whether it comes before the others, and so runs wherever it is exact.

    Raises:
        SettingError: a backend of that name is registered already.
    """
    if backend.NAME in (each.NAME for each in _backends):
        raise SettingError(f"A backend {backend.NAME!r} is registered already.")
    _backends.insert(0 if preferred else len(_backends), backend)


def backends() -> list[str]:
    """Return the names of all backends, the preferred one first."""
    return [backend.NAME for backend in _backends]


def get(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        SettingError: no backend has that name.
    """
    for backend in _backends:
        if name == backend.NAME:
            return backend
    raise SettingError(
        f"{option('backend')} is {name!r}; it is one of {', '.join(backends())}."
        f"{nearest(name, backends())}"
    )


def refusals(
    device: torch.device | str = "cpu", needs: KernelRequirements = ANY_WEIGHT
) -> dict[str, str]:
    """Return the reasons of the backends that are preferred to the selected one."""
    reasons = explain(device, needs)
    refused = itertools.takewhile(lambda item: item[1] is not None, reasons.items())
    return {name: str(reason) for name, reason in refused}


def explain(
    device: torch.device | str = "cpu", needs: KernelRequirements = ANY_WEIGHT
) -> dict[str, str | None]:
    """Return for each backend why it is not exact on a device or slower than a later one, or None
    if it is neither."""
    return {each.NAME: _refusal(each, torch.device(device), needs) for each in _backends}


def _refusal(backend: Backend, device: torch.device, needs: KernelRequirements) -> str | None:
    return backend.unsupported_reason(device, needs) or backend.slow_reason(device, needs)


def select(
    device: torch.device | str = "cpu",
    name: str | None = None,
    needs: KernelRequirements = ANY_WEIGHT,
) -> Backend:
    """Return the named backend, or the first one that is exact on this device and not slower than a
    later one.

    Raises:
        SettingError: no backend has that name, or it is not exact here.
    """
    device = torch.device(device)
    if name is None:
        return next(each for each in _backends if _refusal(each, device, needs) is None)
    chosen = get(name)
    reason = chosen.unsupported_reason(device, needs)
    if reason is not None:
        exact = [each.NAME for each in _backends if each.unsupported_reason(device, needs) is None]
        raise SettingError(
            f"The {name} backend is not exact here: {reason} Exact are: {', '.join(exact)}."
        )
    return chosen
