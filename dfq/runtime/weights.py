"""Integer weights as checkpoints store them, and as products multiply them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.runtime.packing import packed_bytes, unpack_bits


@dataclass(frozen=True)
class StoredWeight:
    """Integer weights ``[out, inputs]`` in the bytes of a checkpoint.

    ``content`` is int8 ``[out, inputs]`` of 8 bits, and of fewer uint8 ``[out, ceil(inputs * bits
    / 8)]`` (:func:`dfq.runtime.packing.pack_bits`).  With ``group_scale``, uint8
    ``[out, ceil(inputs / group)]``, each run of ``group`` inputs has an integer scale within its
    channel.
    """

    content: Tensor
    bits: int
    inputs: int
    group_scale: Tensor | None = None
    group: int = 0

    def unpacked(self) -> Tensor:
        """The integers of ``bits`` bits, int8 ``[out, inputs]``."""
        if self.bits == 8:
            return self.content
        return unpack_bits(self.content, self.bits, self.inputs)

    def integers(self) -> Tensor:
        """What products multiply: the integers times their groups' scales, int8
        ``[out, inputs]``."""
        return multiply_groups(self.unpacked(), self.group_scale, self.group)


def stored_shape(outputs: int, inputs: int, bits: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and type of :attr:`StoredWeight.content`."""
    if bits == 8:
        return (outputs, inputs), torch.int8
    return (outputs, packed_bytes(inputs, bits)), torch.uint8


def multiply_groups(integers: Tensor, group_scale: Tensor | None, group: int) -> Tensor:
    """int8 ``[out, in]`` times the scales of their groups."""
    if group_scale is None:
        return integers
    return integers * expand_groups(group_scale, group, integers.shape[1]).to(torch.int8)


def expand_groups(group_scale: Tensor, group: int, inputs: int) -> Tensor:
    """The group scale of each weight: ``[out, groups]`` to ``[out, inputs]``."""
    # torch.compile (2.14) repeats and slices bytes wrongly where inputs are no multiple of group
    index = torch.arange(inputs, device=group_scale.device) // group
    return group_scale[:, index]
