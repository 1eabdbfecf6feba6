"""The public surface as text, in which a review sees every change.

After a change that is meant: ``python tests/surface.py > tests/surface.txt``.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

import typer

import dfq
from dfq.cli.app import app
from dfq.pipeline import stages


def _parameters(function: Any) -> Iterator[str]:
    starred = False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        yield p.name if p.default is p.empty else f"{p.name} = {p.default!r}"


def _classes(kind: Any) -> Iterator[Any]:
    """Dataclasses inside a type such as ``list[LayerNoise] | None``."""
    if dataclasses.is_dataclass(kind):
        yield kind
    for part in typing.get_args(kind):
        yield from _classes(part)


def _records() -> dict[str, Any]:
    """Every public dataclass, and those that its fields hold."""
    todo = [getattr(dfq, name) for name in dfq.__all__]
    todo += [getattr(stages, name) for name in stages.__all__]
    known: dict[str, Any] = {}
    while todo:
        kind = todo.pop()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__name__ not in known:
            known[kind.__name__] = kind
            for hint in typing.get_type_hints(kind).values():
                todo += _classes(hint)
    return dict(sorted(known.items()))


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command of ``dfq`` by its name, such as ``cache list``."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def _block(title: str, lines: Iterator[str]) -> str:
    return "\n".join([title, *(f"    {line}" for line in lines)])


def surface() -> str:
    """Names, parameters with their defaults, fields, commands and flags, one a line."""
    functions = {name: getattr(dfq, name) for name in dfq.__all__}
    functions = {n: f for n, f in functions.items() if isinstance(f, types.FunctionType)}
    parts = {name: getattr(stages, name) for name in stages.__all__}
    blocks = [
        _block("names of dfq", iter(dfq.__all__)),
        *(_block(f"function {n}", _parameters(f)) for n, f in functions.items()),
        *(
            _block(f"stage {n}", _parameters(f))
            for n, f in parts.items()
            if isinstance(f, types.FunctionType)
        ),
        *(
            _block(f"fields of {n}", (f.name for f in dataclasses.fields(kind)))
            for n, kind in _records().items()
        ),
        *(
            _block(
                f"command {n}",
                (", ".join([*p.opts, *p.secondary_opts]) for p in command.params),
            )
            for n, command in commands()
        ),
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    print(surface(), end="")
