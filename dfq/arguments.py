"""Type checks of the public functions' arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import (
    Any,
    ParamSpec,
    TypeVar,
    Union,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError

from dfq.argument_names import option
from dfq.errors import SettingError, nearest
from dfq.process_state import fresh_state

P = ParamSpec("P")
T = TypeVar("T")

LONGEST = 255
"""Largest length of a file name in bytes."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function to check its arguments against their annotations.

    The function then runs inside :func:`dfq.process_state.fresh_state`.  ``**options:
    Unpack[Options]``, of a TypedDict ``Options``, are shown and checked as keyword arguments that
    are None by default.

    Raises:
        SettingError: an argument has another type, or is invalid as a name or path.
        TypeError: an argument is missing or unknown.
    """
    signature = _with_options(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        options = _options(function)
        return get_type_hints(function) | ({} if options is None else get_type_hints(options))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            unknown = [name for name in kwargs if name not in signature.parameters]
            if not unknown:
                raise TypeError(f"{function.__name__}() {error}.") from None
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}."
                f"{nearest(unknown[0], signature.parameters)}"
            ) from None
        for name, value in given.items():
            hint = hints()[name]
            if not fits(value, hint):
                raise SettingError(
                    f"{option(name)} is {value!r:.80}, of type {type(value).__name__}; "
                    f"it takes {_names(hint)}."
                )
            check_text(name, value)
        with fresh_state():
            return function(*args, **kwargs)

    cast(Any, call).__signature__ = signature
    return call


def _options(function: Callable[..., Any]) -> Any:
    """Return the TypedDict of a function's ``**options: Unpack[...]``; None if it has none."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            hint = get_type_hints(function)[parameter.name]
            return get_args(hint)[0] if get_origin(hint) is Unpack else None
    return None


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature with each field of ``**options: Unpack[...]`` as a parameter."""
    signature, options = inspect.signature(function), _options(function)
    if options is None:
        return signature
    *named, _ = signature.parameters.values()
    hints = get_type_hints(options)
    added = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in hints.items()
    )
    return signature.replace(parameters=[*named, *added])


def check_text(name: str, value: Any) -> None:
    """Raise :class:`SettingError` for text that is invalid as a name or path."""
    if not isinstance(value, str | Path):
        return
    if value == "":
        raise SettingError(f"{option(name)} is empty; leave it out, or give it a value.")
    if "\0" in str(value):
        raise SettingError(f"{option(name)} is {str(value)!r:.80}, which holds a null character.")
    longest = max((len(os.fsencode(part)) for part in Path(value).parts), default=0)
    if longest > LONGEST:
        raise SettingError(
            f"{option(name)} is {str(value)!r:.80}, with a name of {longest} bytes; files and "
            f"models have at most {LONGEST}."
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type, without conversion."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, each) for each in get_args(hint))
    try:
        _adapter(hint).validate_python(value)
    except ValidationError:
        return False
    return not (isinstance(value, str | bytes) and get_origin(hint) is Sequence)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):
        return TypeAdapter(InstanceOf[hint])
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _names(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        names = [_names(each) for each in inner]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if origin is not None:
        return f"{origin.__name__} of {' to '.join(map(_names, inner))}"
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))
