"""Inversion methods, one file each: their fields, and their schedules of patch removal.

A file that defines a subclass of :class:`Method` adds a method; its fields become keys of a
recipe's ``[inversion]``.  Nothing here imports PyTorch: recipes are read without it.
"""

from dfq.inversion.registry import discover
from dfq.inversion.schedules.method import Event, Method

__all__ = ["METHODS", "Event", "Method"]

METHODS: dict[str, type[Method]] = discover(
    __name__, __path__, Method, first=("pri", "smi", "dmi", "noise")
)
"""All methods by name."""
