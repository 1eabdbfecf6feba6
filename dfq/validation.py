"""Settings checked by pydantic, with errors that say what arrived and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from dfq.errors import SettingError, nearest

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""No conversion: ``"1"`` and ``True`` are no numbers, ``1.0`` is no whole number."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SettingInfo:
    """A field of a settings class.

    ``kind`` is its type without bounds: a class, a ``Literal`` or ``tuple[int, ...]``;
    ``low`` and ``high`` are the inclusive bounds of a number or of a tuple's numbers.
    """

    name: str
    kind: Any
    default: Any
    description: str
    optional: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def allowed(self) -> str:
        """The values that it takes, in words."""
        if get_origin(self.kind) is Literal:
            return ", ".join(map(str, get_args(self.kind)))
        if self.kind is bool:
            return "true or false"
        if self.low is None:
            return "tables of settings" if self.kind is dict else "text"
        number = {int: "a whole number", float: "a number", tuple[int, ...]: "whole numbers"}
        return f"{number.get(self.kind, 'numbers')} from {self.low} to {self.high}"

    def refuse(self, value: Any) -> SettingError:
        """The error for a value that is not allowed."""
        close = ""
        if isinstance(value, str) and get_origin(self.kind) is Literal:
            close = nearest(value, map(str, get_args(self.kind)))
        return SettingError(f"{self.name} is {value!r:.200}; allowed: {self.allowed}.{close}")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields pydantic checks on construction.

    Bounds and descriptions are those of ``pydantic.Field`` in the annotations.  An instance is an
    ordinary dataclass: ``dataclasses.replace`` checks again.

    Raises:
        SettingError: on construction, for a value of another type or out of its bounds.
    """
    made: Any = pydantic_dataclass(frozen=True, config=STRICT)(cls)
    construct = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (it is the class's)
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise _refusal(made, args, kwargs, error) from error

    made.__init__ = __init__
    return cast("type[T]", made)


def _refusal(
    kind: type[Any], args: tuple[Any, ...], values: Mapping[str, Any], error: ValidationError
) -> SettingError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = first["loc"][0] if first["loc"] else ""
    infos = describe(kind)
    if isinstance(name, int):
        name = list(infos)[name] if name < len(infos) else ""
    given = {**dict(zip(infos, args, strict=False)), **values}
    if name not in infos:
        return SettingError(unknown("setting", str(name), infos))
    return infos[str(name)].refuse(given.get(str(name), first["input"]))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the known ones and the nearest."""
    known = list(known)
    return f"Unknown {what} {name!r}; known: {', '.join(known)}.{nearest(name, known)}"


def describe(kind: type[Any]) -> dict[str, SettingInfo]:
    """The fields of a settings class by name, in their order."""
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return {name: _describe(name, field) for name, field in fields.items()}


def _describe(name: str, field: FieldInfo) -> SettingInfo:
    kind, constraints = field.annotation, list(field.metadata)
    options = [each for each in get_args(kind) if each is not type(None)]
    optional = type(None) in get_args(kind)
    if optional:
        kind = options[0]
    kind, inner = _unwrap(kind)
    constraints += inner
    if get_origin(kind) is tuple:
        element, inner = _unwrap(get_args(kind)[0])
        kind, constraints = tuple[element, ...], constraints + inner  # type: ignore[valid-type]
    elif get_origin(kind) is dict:
        kind = dict
    default = field.get_default(call_default_factory=True)
    low = [each.ge for each in constraints if getattr(each, "ge", None) is not None]
    high = [each.le for each in constraints if getattr(each, "le", None) is not None]
    return SettingInfo(
        name,
        kind,
        default,
        field.description or "",
        optional,
        low[0] if low else None,
        high[0] if high else None,
    )


def _unwrap(kind: Any) -> tuple[Any, list[Any]]:
    """A type without ``Annotated``, and what that says of it."""
    if get_origin(kind) is not Annotated:
        return kind, []
    inner, *said = get_args(kind)
    return inner, [part for each in said for part in getattr(each, "metadata", [each])]
