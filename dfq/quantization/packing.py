"""Two signed 4-bit integers in a byte, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """Pack int8 ``[..., K]`` in -8..7 into uint8 ``[..., ceil(K / 2)]``.

    ::

        byte j:   bits 7..4          bits 3..0
                  values[2j + 1]     values[2j]        each in two's complement

    An odd ``K`` leaves the high half of the last byte 0.

    Raises:
        ValueError: a value is out of range.
    """
    if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise ValueError(f"int4 takes -8..7, got {int(values.min())}..{int(values.max())}.")
    nibbles = values.to(torch.uint8) & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """The inverse of :func:`pack_int4`: uint8 ``[..., ceil(K / 2)]`` to int8 ``[..., K]``."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :length]
    return (halves ^ 8).to(torch.int8) - 8
