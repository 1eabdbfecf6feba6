"""Integer kernels behind one small interface.

``reference`` defines the arithmetic in plain torch and runs anywhere; ``onednn`` runs it
on x86 processors, wherever its products are exact.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dfq.errors import SettingError
from dfq.runtime import onednn, reference
from dfq.runtime.params import LinearParams, OutputFormat


class Kernels(Protocol):
    """What a backend provides; see :mod:`dfq.runtime.reference` for the arithmetic."""

    NAME: str

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
        self, x: Tensor, scale: float, zero_point: int, affine: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Float ``[..., in]``, or ``x * affine[0] + affine[1]``, to uint8."""

    def quantize_signed(self, x: Tensor, scale: float) -> Tensor:
        """Float to int8."""

    def fold_norm(self, norm: nn.LayerNorm, scale: float, zero_point: int) -> object:
        """A norm and the quantizer of its output in the backend's own form, built once."""

    def quantize_norm(self, x: Tensor, folded: object) -> Tensor:
        """Layer norm of float ``[..., C]``, quantized to uint8."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        """int8 ``[B, H, T, D]`` each to float ``[B, H, T, D]`` in units of ``v``."""


BACKENDS: dict[str, Kernels] = {"onednn": onednn, "reference": reference}


def select(
    device: torch.device | str = "cpu", name: str | None = None, largest: int = 127
) -> Kernels:
    """The named backend, or the fastest that is exact on this device.

    ``largest`` is the largest magnitude of the integer weights: without VNNI oneDNN is exact
    up to 64.

    Raises:
        SettingError: no backend of that name, or it is not exact here.
    """
    device = torch.device(device)
    if name is None:
        return BACKENDS["onednn" if onednn.available(device, largest) else "reference"]
    if name not in BACKENDS:
        raise SettingError(f"Unknown backend {name!r}; there are {sorted(BACKENDS)}.")
    if name == "onednn" and not onednn.available(device, largest):
        raise SettingError(
            f"The onednn backend needs an x86 processor with 8-bit dot products (VNNI), or AVX2 "
            f"and weights within -64..64; here it is {device.type!r}, and weights reach {largest}. "
            "Use 'reference', or quantize with reduce_range."
        )
    return BACKENDS[name]
