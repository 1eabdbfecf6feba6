"""Options of experiments: fields of a dataclass that become flags of the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Annotated, Any, get_type_hints

import typer

from dfq.errors import SettingError, nearest


def option(default: Any, text: str) -> Any:
    """A documented field of an options dataclass."""
    return field(default=default, metadata={"help": text})


def words(text: str, flag: str, known: Iterable[str] | None = None) -> list[str]:
    """A list written with commas, each of ``known`` where that is given.

    Raises:
        SettingError: it is empty, or names something unknown.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise SettingError(f"{flag} is empty; give one or more, with commas.")
    if known is not None:
        choices = list(known)
        for word in found:
            if word not in choices:
                raise SettingError(
                    f"{flag} names {word!r}; known: {', '.join(choices)}.{nearest(word, choices)}"
                )
    return list(dict.fromkeys(found))


def numbers(text: str, flag: str, low: int = 0) -> list[int]:
    """Whole numbers of at least ``low`` written with commas.

    Raises:
        SettingError: one is not.
    """
    found = words(text, flag)
    if not all(w.isdecimal() and int(w) >= low for w in found):
        raise SettingError(f"{flag} is {text!r}; give whole numbers of at least {low}.")
    return [int(w) for w in found]


def at_least(value: int | None, low: int, flag: str) -> None:
    """Raise :class:`SettingError` if a number is below its bound; None passes."""
    if value is not None and value < low:
        raise SettingError(f"{flag} is {value}; it must be at least {low}.")


def function(options: type[Any], body: Callable[..., None], shared: dict[str, Any]) -> Any:
    """A function for typer whose parameters are an options dataclass's fields.

    ``shared`` maps further parameters to (annotation, default); ``body`` is called with
    the options, then these by name.
    """
    hints = get_type_hints(options)
    parameters = {
        f.name: (Annotated[hints[f.name], typer.Option(help=f.metadata["help"])], f.default)
        for f in dataclasses.fields(options)
    }

    def run(**given: Any) -> None:
        own = {name: given.pop(name) for name in parameters}
        body(options(**own), **given)

    signature = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in {**parameters, **shared}.items()
    ]
    command: Any = run  # functions have no attribute of that name until one is set
    command.__signature__ = inspect.Signature(signature)
    command.__annotations__ = {p.name: p.annotation for p in signature}
    return command
