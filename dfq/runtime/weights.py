"""Integer weights: stored form, and the form that matrix products multiply."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dfq.runtime.packing import packed_bytes, unpack_bits


@dataclass(frozen=True)
class StoredWeight:
    """Integer weights ``[out, inputs]`` as a checkpoint stores them.

    ``content`` is int8 ``[out, inputs]`` for 8 bits, else packed uint8
    ``[out, ceil(inputs * bits / 8)]`` (:func:`dfq.runtime.packing.pack_bits`).  ``group_scale``,
    uint8 ``[out, ceil(inputs / group)]``, is the integer scale of each group of ``group`` inputs
    relative to the channel's scale.
    """

    content: Tensor
    bits: int
    inputs: int
    group_scale: Tensor | None = None
    group: int = 0

    def unpacked(self) -> Tensor:
        """Unpack the stored integers: int8 ``[out, inputs]``."""
        if self.bits == 8:
            return self.content
        return unpack_bits(self.content, self.bits, self.inputs)

    @cached_property
    def integers(self) -> Tensor:
        """Return the stored integers times their group scales, int8 ``[out, inputs]``: the
        operand of the matrix product."""
        return apply_group_scale(self.unpacked(), self.group_scale, self.group)

    @property
    def largest(self) -> int:
        """Largest magnitude of what products multiply."""
        low, high = self.integers.aminmax()
        return max(-int(low), int(high))


def stored_shape(outputs: int, inputs: int, bits: int) -> tuple[tuple[int, int], torch.dtype]:
    """Return shape and dtype of :attr:`StoredWeight.content`."""
    if bits == 8:
        return (outputs, inputs), torch.int8
    return (outputs, packed_bytes(inputs, bits)), torch.uint8


def apply_group_scale(integers: Tensor, group_scale: Tensor | None, group: int) -> Tensor:
    """Multiply int8 ``[out, in]`` by the scales of their groups."""
    if group_scale is None:
        return integers
    return integers * expand_group_scale(group_scale, group, integers.shape[1]).to(torch.int8)


def expand_group_scale(group_scale: Tensor, group: int, inputs: int) -> Tensor:
    """Repeat each group's scale for its inputs: ``[out, groups]`` to ``[out, inputs]``."""
    # torch.compile (2.14) repeats and slices bytes wrongly where inputs are no multiple of group
    index = torch.arange(inputs, device=group_scale.device) // group
    return group_scale[:, index]
