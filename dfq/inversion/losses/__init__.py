"""Losses of images (regularizers), one file each.

A file that defines a subclass of :class:`ImageLoss` adds a loss; its fields become keys of a
recipe's ``[inversion]``.  Files import PyTorch inside their functions: recipes are read without it.
"""

from dfq.inversion.losses.loss import BoundLoss, ImageLoss
from dfq.inversion.registry import discover

__all__ = ["LOSSES", "BoundLoss", "ImageLoss", "losses_of"]

LOSSES: dict[str, type[ImageLoss]] = discover(__name__, __path__, ImageLoss)
"""All losses by name."""


def losses_of(settings: object) -> tuple[ImageLoss, ...]:
    """Return the losses whose weight in the settings is not 0."""
    values = (kind.from_settings(settings) for kind in LOSSES.values())
    return tuple(value for value in values if value.weight)
