"""Packing of signed 2- to 7-bit integers into bytes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 8
"""Integers of a run; a run of ``bits``-bit integers fills exactly ``bits`` bytes."""


def packed_bytes(length: int, bits: int) -> int:
    """Return the size in bytes of ``length`` packed integers of ``bits`` bits."""
    return -(-length * bits // 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack int8 ``[..., K]`` of ``bits`` bits into uint8 ``[..., ceil(K * bits / 8)]``.

    The integers, in two's complement, follow each other from the lowest bit of the first byte
    upwards.  Of 4 bits::

        byte j:   bits 7..4          bits 3..0
                  values[2j + 1]     values[2j]

    Unused bits of the last byte are 0.

    Raises:
        ValueError: a value is out of range.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise ValueError(
            f"int{bits} takes {low}..{high}, got {int(values.min())}..{int(values.max())}."
        )
    length = values.shape[-1]
    fields = values.to(torch.uint8).bitwise_and_((1 << bits) - 1)
    runs = F.pad(fields, (0, -length % RUN)).unflatten(-1, (-1, RUN))
    content = []
    for byte in range(bits):
        parts = [(field, field * bits - 8 * byte) for field in range(RUN)]
        shifted = [_shift(runs[..., field], by) for field, by in parts if -bits < by < 8]
        content.append(functools.reduce(torch.bitwise_or, shifted))
    packed = torch.stack(content, dim=-1).flatten(-2)
    return packed[..., : packed_bytes(length, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """Invert :func:`pack_bits`; returns int8 ``[..., length]``."""
    runs = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    fields = []
    for field in range(RUN):
        byte, start = divmod(field * bits, 8)
        value = _shift(runs[..., byte], -start)
        if start + bits > 8:
            value = value | _shift(runs[..., byte + 1], 8 - start)
        fields.append(value)
    sign = 1 << (bits - 1)
    values = torch.stack(fields, dim=-1).flatten(-2)[..., :length] & ((1 << bits) - 1)
    return (values ^ sign).to(torch.int8) - sign


def _shift(x: Tensor, by: int) -> Tensor:
    return x << by if by >= 0 else x >> -by
