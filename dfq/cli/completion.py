"""Shell completion of names; nothing that takes long to load is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dfq.catalog import known_names
from dfq.inversion.schedules import METHODS
from dfq.recipe_files import shipped_recipes

Complete = Callable[[str], list[str]]
"""Names that begin with what has been typed; none lets the shell complete a path."""


def one_of(names: Iterable[str]) -> Complete:
    """Return the completion of fixed names."""
    known = tuple(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def models(incomplete: str) -> list[str]:
    """Complete names of supported models."""
    return [name for name in known_names() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Complete names of recipes that ship with dfq."""
    return [name for name in shipped_recipes() if name.startswith(incomplete)]


methods = one_of(METHODS)
