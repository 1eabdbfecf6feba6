"""Names of arguments in messages: parameters for callers from Python, flags on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FLAGS = {
    "checkpoint": "CHECKPOINT",
    "evaluate": "--no-evaluate",
    "float_model": "--float",
    "model": "MODEL",
    "name": "NAME",
    "path": "PATH",
    "pattern": "PATTERN",
    "teacher": "MODEL",
}
"""Parameters whose flag is not their name with hyphens; in capitals those without a flag."""

_flags: ContextVar[Mapping[str, str] | None] = ContextVar("flags", default=None)
"""Exceptions as :data:`FLAGS` on the command line, None for callers from Python."""


@contextmanager
def flag_names(**exceptions: str) -> Iterator[None]:
    """Make messages of this block name flags.

    Args:
        exceptions: flags that differ from :data:`FLAGS`, by parameter.
    """
    token = _flags.set({**FLAGS, **exceptions})
    try:
        yield
    finally:
        _flags.reset(token)


@contextmanager
def parameter_names() -> Iterator[None]:
    """Make messages of this block name parameters, as for the keys of a recipe."""
    token = _flags.set(None)
    try:
        yield
    finally:
        _flags.reset(token)


def option(name: str, value: Any = None, *, metavar: str = "") -> str:
    """Return how the caller gives an argument.

    Args:
        name: parameter of a public function.
        value: value to suggest: ``stages=4``, or ``--stages 4``; None for the name alone, False for
            ``evaluate=False``, or ``--no-evaluate``.
        metavar: placeholder of the value on the command line: ``eval``, or ``--eval DATA``.
    """
    flags = _flags.get()
    if flags is None:
        return name if value is None else f"{name}={value!r}"
    flag = flags.get(name, f"--{name.replace('_', '-')}")
    if value is False:
        return flag
    text = metavar if value is None else _flag_value(value)
    return f"{flag} {text}".rstrip()


def _flag_value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)
