"""Backends: sets of integer kernels, from the fastest to the one that runs anywhere."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dfq.errors import SettingError, nearest
from dfq.runtime import onednn, reference
from dfq.runtime.params import LinearParams, Needs, OutputFormat
from dfq.runtime.qtype import Quantizer


class Backend(Protocol):
    """Integer kernels; see :mod:`dfq.runtime.reference` for the arithmetic."""

    NAME: str

    def refusal(self, device: torch.device, needs: Needs) -> str | None:
        """Why the kernels are not exact for a layer on a device; None where they are."""

    def scores_at_once(self, device: torch.device) -> int:
        """Attention scores that are best computed at once, over all images and heads."""

    def prepack(self, params: LinearParams) -> object:
        """Weights in the backend's own layout, built once."""

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
        self, x: Tensor, quantizer: Quantizer, affine: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Float ``[..., in]``, or ``x * affine[0] + affine[1]``, to uint8; to int8 where the
        quantizer is signed."""

    def fold_norm(self, norm: nn.LayerNorm, quantizer: Quantizer) -> object:
        """A norm and the quantizer of its output in the backend's own form, built once."""

    def quantize_norm(self, x: Tensor, folded: object) -> Tensor:
        """Layer norm of float ``[..., C]``, quantized to uint8."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        """int8 ``[B, H, T, D]`` each to float ``[B, H, T, D]`` in units of ``v``."""


ANY_WEIGHT = Needs()

_backends: list[Backend] = [onednn, reference]


def register(backend: Backend) -> None:
    """Add a backend, to be preferred to those that are there.

    Raises:
        SettingError: one of that name is there.
    """
    if backend.NAME in (each.NAME for each in _backends):
        raise SettingError(f"A backend {backend.NAME!r} is registered already.")
    _backends.insert(0, backend)


def unregister(name: str) -> None:
    """Take a backend away."""
    _backends.remove(get(name))


def backends() -> list[str]:
    """Names of the backends, the preferred first."""
    return [backend.NAME for backend in _backends]


def get(name: str) -> Backend:
    """The backend of a name.

    Raises:
        SettingError: there is none.
    """
    for backend in _backends:
        if name == backend.NAME:
            return backend
    raise SettingError(
        f"Unknown backend {name!r}; there are {sorted(backends())}.{nearest(name, backends())}"
    )


def explain(device: torch.device | str = "cpu", needs: Needs = ANY_WEIGHT) -> dict[str, str | None]:
    """Why each backend is not exact for a layer on a device; None where it is."""
    return {each.NAME: each.refusal(torch.device(device), needs) for each in _backends}


def select(
    device: torch.device | str = "cpu", name: str | None = None, needs: Needs = ANY_WEIGHT
) -> Backend:
    """The named backend, or the first that is exact for a layer on this device.

    Raises:
        SettingError: no backend of that name, or it is not exact here.
    """
    device = torch.device(device)
    if name is None:
        return next(each for each in _backends if each.refusal(device, needs) is None)
    chosen = get(name)
    reason = chosen.refusal(device, needs)
    if reason is not None:
        raise SettingError(f"The {name} backend is not exact here: {reason}")
    return chosen
