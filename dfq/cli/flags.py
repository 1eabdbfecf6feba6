"""The flag ``--json``, known as words before the command line is parsed and as a value after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import typer

from dfq.cli.interrupts import end_with_json

JSON, QUIET = ("--json",), ("--quiet", "-q")

_KEY = "dfq.json"
"""Key in the ``meta`` of contexts, which a command shares with its groups."""


def has_flag(words: Sequence[str], flag: tuple[str, ...]) -> bool:
    """Whether words that are not parsed yet hold a flag before ``--``, by one of its names."""
    return any(word in flag for word in takewhile(lambda word: word != "--", words))


def keep_json(ctx: Any, wanted: bool) -> None:
    """Record whether errors of a context, and of those below it, are also written as JSON."""
    ctx.meta[_KEY] = wanted


def wants_json(ctx: Any) -> bool:
    """Whether errors of a context are also written as JSON."""
    return bool(ctx.meta.get(_KEY))


def parsed_json(ctx: typer.Context, wanted: bool) -> bool:
    """Callback of the option ``--json``, which is eager: later errors know the parsed value."""
    keep_json(ctx, wanted)
    if wanted:
        end_with_json()
    return wanted
