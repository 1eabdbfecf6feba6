"""What a loss of images is: its weight, and its gradient on live patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from dfq.inversion.registry import Part

if TYPE_CHECKING:
    from torch import Tensor

    from dfq.sparse import Grid


class Term(Protocol):
    """A loss of images whose live patches are known.

    On a GPU its gradient is captured in a graph: it must not wait for values on the device, and
    :meth:`place` must write new values into the tensors that it reads.
    """

    def place(self, positions: Tensor) -> None:
        """Take other positions, int64 ``[B, L]``, as many as before."""

    def gradient(self, patches: Tensor) -> Tensor:
        """A new tensor: the gradient ``[B, L, D]`` of the sum over images, without the weight."""


class ImageLoss(Part):
    """A loss of images beside the model's own; a subclass is decorated with
    :func:`dfq.validation.settings`.

    Its fields are keys of a recipe.  It should be the mean or the norm of something within an
    image and not a mean over the batch, so that images do not depend on what else is made.
    """

    weight_field: ClassVar[str]
    """The field that is its weight; 0 by default, so that it is off."""

    @property
    def weight(self) -> float:
        """What its gradient is multiplied with."""
        return float(getattr(self, self.weight_field))

    def bind(self, positions: Tensor, grid: Grid) -> Term:
        """The loss of images with patches at ``positions``, int64 ``[B, L]``."""
        raise NotImplementedError
