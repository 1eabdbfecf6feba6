"""Discovery of inversion methods and losses, and their common base class."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
"""Pattern of the name of a method or a loss."""


class Component:
    """Base of methods and losses, which declare fields of :class:`dfq.InversionSettings`.

    A subclass is decorated with :func:`dfq.validation.settings`.
    """

    name: ClassVar[str]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields that the class declares."""
        return tuple(field.name for field in dataclasses.fields(cast(Any, cls)))

    @classmethod
    def from_settings(cls, settings: object) -> Self:
        """Create an instance from settings that have its fields."""
        return cls(**{name: getattr(settings, name) for name in cls.field_names()})


P = TypeVar("P", bound=Component)


def discover(
    package: str, path: Iterable[str], base: type[P], first: Sequence[str] = ()
) -> dict[str, type[P]]:
    """Import every module of a package and collect the subclasses of ``base`` that it defines.

    Returns them by name: those in ``first`` in that order, then the others alphabetically.

    Raises:
        TypeError: a name is not a word, or two classes have it.
    """
    kinds: dict[str, type[P]] = {}
    for module in pkgutil.iter_modules(path):
        content = vars(importlib.import_module(f"{package}.{module.name}"))
        for kind in content.values():
            if not (isinstance(kind, type) and issubclass(kind, base)):
                continue
            if kind is base or kind.__module__ != content["__name__"]:
                continue
            if kind.name in kinds or NAME.fullmatch(kind.name) is None:
                raise TypeError(f"{kind.__module__}: the name {kind.name!r} is taken or no word.")
            kinds[kind.name] = kind
    order = [*first, *sorted(set(kinds) - set(first))]
    return {name: kinds[name] for name in order}
