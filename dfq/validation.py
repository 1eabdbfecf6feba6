"""Settings classes checked by pydantic, with dfq's own error messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, Strict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from dfq.argument_names import option
from dfq.errors import SettingError, nearest

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Configuration without conversion: ``"1"`` and ``True`` are no numbers, ``1.0`` no integer."""

T = TypeVar("T")

Shares = Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], Strict(False)]
"""Numbers from 0 to 1; a list counts as a tuple."""

FROM_COMPONENT: Any = object()
"""Default of a field that a component declares (:func:`with_component_fields`); the class itself
gives only its position and its type."""


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """Metadata of text that must be one of ``names``."""

    names: Collection[str]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names:
            raise ValueError("unknown name")
        return value


@dataclasses.dataclass(frozen=True)
class SettingInfo:
    """Description of a field of a settings class.

    ``kind``: type without bounds: a class, a ``Literal`` or ``tuple[int, ...]``.  ``low`` and
    ``high``: inclusive bounds of a number, or of the numbers of a tuple.
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
        """Allowed values, in words."""
        if get_origin(self.kind) is Literal:
            return ", ".join(map(str, get_args(self.kind)))
        if self.kind is bool:
            return "true or false"
        if self.low is None:
            return "tables of settings" if self.kind is dict else "text"
        number = {int: "a whole number", float: "a number", tuple[int, ...]: "whole numbers"}
        return f"{number.get(self.kind, 'numbers')} from {self.low} to {self.high}"

    def error(self, value: Any) -> SettingError:
        """Return the error for a value that is not allowed."""
        close = ""
        if isinstance(value, str) and get_origin(self.kind) is Literal:
            close = nearest(value, map(str, get_args(self.kind)))
        return SettingError(
            f"{option(self.name)} is {value!r:.200}; allowed: {self.allowed}.{close}"
        )


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Decorate a class as a frozen dataclass whose fields pydantic checks on construction.

    Bounds and descriptions are given by ``pydantic.Field`` in the annotations.  Instances are
    dataclasses; ``dataclasses.replace`` checks again.

    Raises:
        SettingError: on construction, for a value of another type or out of bounds.
    """
    made: Any = pydantic_dataclass(frozen=True, config=STRICT)(cls)
    construct = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (it is the class's)
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise _convert_error(made, args, kwargs, error) from error

    made.__init__ = __init__
    return cast("type[T]", made)


def with_component_fields(
    components: Iterable[tuple[str, type[Any]]],
) -> Callable[[type[T]], type[T]]:
    """Decorate a class to add the fields of settings classes, each with a label for descriptions.

    Several components may declare the same field.  Fields that the class annotates with the
    default :data:`FROM_COMPONENT` keep their position, the others come last.

    Raises:
        TypeError: two components declare a field differently, or none declares it.
    """
    owners: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for label, component in components:
        for name, field in cast("dict[str, FieldInfo]", component.__pydantic_fields__).items():
            if name in fields and _declaration(fields[name]) != _declaration(field):
                raise TypeError(f"{component.__name__}.{name} is declared differently elsewhere.")
            owners.setdefault(name, []).append(label)
            fields[name] = field

    def fill(cls: type[T]) -> type[T]:
        for name in cls.__annotations__:
            if (getattr(cls, name, None) is FROM_COMPONENT) != (name in fields):
                raise TypeError(f"{cls.__name__}.{name} is declared twice or nowhere.")
        for name, field in fields.items():
            label = ", ".join(filter(None, owners[name]))
            text = f"{label}: {field.description}" if label else field.description
            kind: Any = field.annotation
            cls.__annotations__[name] = Annotated[kind, *field.metadata] if field.metadata else kind
            setattr(cls, name, Field(default=field.default, description=text))
        return cls

    return fill


def _declaration(field: FieldInfo) -> tuple[Any, ...]:
    return field.annotation, field.metadata, field.default, field.description


def _convert_error(
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
    return infos[str(name)].error(given.get(str(name), first["input"]))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the known and the closest ones."""
    known = list(known)
    return f"Unknown {what} {name!r}; known: {', '.join(known)}.{nearest(name, known)}"


def describe(kind: type[Any]) -> dict[str, SettingInfo]:
    """Describe the fields of a settings class, by name and in order."""
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
    for each in constraints:
        if isinstance(each, OneOf):
            kind = cast(Any, Literal[tuple(each.names)])
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
    """Split an ``Annotated`` type into the type and its constraints."""
    if get_origin(kind) is not Annotated:
        return kind, []
    inner, *annotations = get_args(kind)
    return inner, [part for each in annotations for part in getattr(each, "metadata", [each])]
