"""Options of experiments: dataclasses whose fields become flags of the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Annotated, Any, get_type_hints

import typer

from dfq.errors import SettingError, nearest


def option(default: Any, text: str) -> Any:
    """Declare a field of an options dataclass with its help text."""
    return field(default=default, metadata={"help": text})


def words(text: str, flag: str, known: Iterable[str] | None = None) -> list[str]:
    """Parse a comma-separated list of distinct words.

    Raises:
        SettingError: the list is empty, or a word is not in ``known``.
    """
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen:
        raise SettingError(f"{flag} is empty; give one or more values, separated by commas.")
    if known is not None:
        choices = list(known)
        for word in chosen:
            if word not in choices:
                raise SettingError(
                    f"{flag} names {word!r}; known: {', '.join(choices)}.{nearest(word, choices)}"
                )
    return list(dict.fromkeys(chosen))


def numbers(text: str, flag: str, low: int = 0) -> list[int]:
    """Parse a comma-separated list of whole numbers of at least ``low``.

    Raises:
        SettingError: the list is empty, or a value is another one.
    """
    chosen = words(text, flag)
    if not all(w.isdecimal() and int(w) >= low for w in chosen):
        raise SettingError(
            f"{flag} is {text!r}; give whole numbers of at least {low}, separated by commas."
        )
    return [int(w) for w in chosen]


def at_least(value: int | None, low: int, flag: str) -> None:
    """Raise :class:`SettingError` if a value is below ``low``; None is allowed."""
    if value is not None and value < low:
        raise SettingError(f"{flag} is {value}; it must be at least {low}.")


def function(options: type[Any], body: Callable[..., None], shared: dict[str, Any]) -> Any:
    """Return a function for typer whose parameters are the fields of an options dataclass.

    ``shared`` maps further parameters to (annotation, default).  ``body`` is called with the
    options as an instance of the dataclass, and the further parameters by name.
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
