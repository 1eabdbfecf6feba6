"""Methods and losses as values, found by the files that hold them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
"""The name of a method or a loss."""


class Part:
    """A value that declares some fields of :class:`dfq.InversionSettings` and reads them alone.

    Its class is decorated with :func:`dfq.validation.settings`.
    """

    name: ClassVar[str]

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of the fields that it declares."""
        return tuple(field.name for field in dataclasses.fields(cast(Any, cls)))

    @classmethod
    def of(cls, settings: object) -> Self:
        """The value that settings with these fields describe."""
        return cls(**{name: getattr(settings, name) for name in cls.fields()})


P = TypeVar("P", bound=Part)


def discover(
    package: str, path: Iterable[str], base: type[P], first: Sequence[str] = ()
) -> dict[str, type[P]]:
    """Import every module of a package and collect the subclasses of ``base`` that it defines.

    Returns them by name: those that ``first`` names in that order, the others by name.

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
