"""Arguments of the public functions, compared with their annotations."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from dfq.errors import SettingError

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS: dict[Any, type[Any]] = {int: Integral, float: Real}


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which then refuses arguments of other types than its annotations name.

    Raises:
        SettingError: an argument has another type.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below says what is wrong with the names
        for name, value in given.items():
            hint = hints()[name]
            if not fits(value, hint):
                raise SettingError(
                    f"{name} is {value!r:.80}, of type {type(value).__name__}; "
                    f"it takes {_names(hint)}."
                )
        return function(*args, **kwargs)

    return call


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; what cannot be told counts as yes."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if origin is Sequence:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str | bytes)
            and all(fits(each, inner[0]) for each in value)
        )
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(each, inner[1]) for each in value.values())
    if (
        hint is not Any
        and isinstance(hint, type)
        and not getattr(hint, "_is_protocol", False)
        and origin is None
    ):
        return isinstance(value, hint)
    return True


def _names(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        names = [_names(each) for each in get_args(hint)]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if hint is type(None):
        return "None"
    return hint.__name__ if get_origin(hint) is None else str(hint).rpartition(".")[2]
