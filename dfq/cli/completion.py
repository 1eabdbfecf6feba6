"""Shell completion of names, without slow imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dfq.catalog import known_names
from dfq.inversion.schedules import METHODS
from dfq.recipe_files import shipped_recipes

Complete = Callable[[str], list[str]]
"""Function that returns the names with a given prefix; without any the shell completes paths."""


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
