"""Interfaces of losses of images: their weight, and their gradient on live patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from dfq.inversion.registry import Component

if TYPE_CHECKING:
    from torch import Tensor

    from dfq.sparse import Grid


class BoundLoss(Protocol):
    """A loss of images with patches at given positions.

    On a GPU its gradient is captured in a CUDA graph: it must not synchronize with the device,
    and :meth:`set_positions` must write new values into the tensors that it reads.
    """

    def set_positions(self, positions: Tensor) -> None:
        """Replace the positions by others, int64 ``[B, L]`` of the same shape."""

    def gradient(self, patches: Tensor) -> Tensor:
        """Return the gradient ``[B, L, D]`` of the sum over images, without the weight.

        The result is a new tensor, which the caller may change.
        """


class ImageLoss(Component):
    """Base of losses of images; a subclass is decorated with :func:`dfq.validation.settings`.

    Its fields are keys of a recipe.  It should be the mean or the norm of something within an
    image and not a mean over the batch, so that images do not depend on what else is made.
    """

    weight_field: ClassVar[str]
    """Name of the field with its weight; 0 by default, so that the loss is off."""

    @property
    def weight(self) -> float:
        """Factor of its gradient."""
        return float(getattr(self, self.weight_field))

    def bind(self, positions: Tensor, grid: Grid) -> BoundLoss:
        """Return the loss of images with patches at ``positions``, int64 ``[B, L]``."""
        raise NotImplementedError
