"""Losses of images beside the model's own, one file each.

A file that defines a subclass of :class:`ImageLoss` adds a loss; its fields become keys of a
recipe's ``[inversion]``.  Files import PyTorch inside their functions: recipes are read without it.
"""

from dfq.inversion.losses.loss import ImageLoss, Term
from dfq.inversion.registry import discover

__all__ = ["LOSSES", "ImageLoss", "Term", "losses_of"]

LOSSES: dict[str, type[ImageLoss]] = discover(__name__, __path__, ImageLoss)
"""All losses by name."""


def losses_of(settings: object) -> tuple[ImageLoss, ...]:
    """The losses that have a weight in these settings."""
    values = (kind.of(settings) for kind in LOSSES.values())
    return tuple(value for value in values if value.weight)
