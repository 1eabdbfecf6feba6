"""The flag ``--json``, before and after the command line is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import typer

from dfq.cli.interrupts import end_with_json

JSON, QUIET = ("--json",), ("--quiet", "-q")

_KEY = "dfq.json"
"""Key in ``Context.meta``, which a command shares with its groups."""


def has_flag(words: Sequence[str], flag: tuple[str, ...]) -> bool:
    """Whether unparsed arguments contain a flag, by one of its names, before ``--``."""
    return any(word in flag for word in takewhile(lambda word: word != "--", words))


def keep_json(ctx: Any, wanted: bool) -> None:
    """Record in a context whether errors are also written as JSON."""
    ctx.meta[_KEY] = wanted


def wants_json(ctx: Any) -> bool:
    """Whether errors of a context are also written as JSON."""
    return bool(ctx.meta.get(_KEY))


def parsed_json(ctx: typer.Context, wanted: bool) -> bool:
    """Handle the eager option ``--json``, so that errors of later options are JSON too."""
    keep_json(ctx, wanted)
    if wanted:
        end_with_json()
    return wanted
