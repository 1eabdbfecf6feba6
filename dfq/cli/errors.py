"""Errors as messages, exit codes and JSON."""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from dfq.cli.interrupts import INTERRUPTED
from dfq.cli.terminal import check_output, err_console, is_first, print_json, wants_json
from dfq.errors import (
    BenchmarkError,
    BenchmarkInterrupt,
    DfqError,
    GateError,
    OutputError,
    UsageError,
)
from dfq.failures import first_line, is_out_of_memory
from dfq.text import escape

KEEPS = ("invert", "quantize", "distill")
"""Commands that invert, unit by unit."""

OSERROR = 2

PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises for wrong usage; typer brings the class along under changing names."""


class Group(TyperGroup):
    """Turns errors that are the caller's or the machine's into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            message = "Interrupted."
            if ctx.invoked_subcommand in KEEPS:
                message += " Finished units of inversion are kept; run it again to go on."
            if not isinstance(error, BenchmarkInterrupt):  # its result has been printed
                _report("KeyboardInterrupt", message)
            err_console.print(message)
            raise typer.Exit(INTERRUPTED) from None
        except (DfqError, PARSER_ERROR, MemoryError, RuntimeError, OSError) as error:
            explain(error, ctx.parent is None, ctx.invoked_subcommand)
            raise

    def main(self, *args: Any, **options: Any) -> Any:
        """Also explains what goes wrong before a command is reached."""
        given = list(args[0] if args and args[0] is not None else sys.argv[1:])
        try:
            check_output(given)
            _check_empty(given)
            return super().main(*args, **options)
        except (DfqError, OSError) as error:
            try:
                explain(error, True)
            except typer.Exit as ended:
                sys.exit(ended.exit_code)
            raise

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except PARSER_ERROR as error:
            explain(error, options.get("parent") is None)
            raise


def _check_empty(words: list[str]) -> None:
    """Refuse empty words, which paths would take for the working directory."""
    for before, word in pairwise(["", *words]):
        flag, equals, value = word.partition("=")
        if not word or (flag.startswith("--") and equals and not value):
            name = flag or before
            what = name if name.startswith("-") else "An argument"
            raise UsageError(f"{what} is empty; leave it out, or give it a value.")


def explain(error: Exception, outermost: bool, verb: str | None = None) -> None:
    """Exit with a message; return where the error is the parser's to show, or nobody's."""
    if isinstance(error, PARSER_ERROR):
        if outermost:
            _report("UsageError", cast(Any, error).format_message())
    elif isinstance(error, GateError | BenchmarkError):
        _fail(str(error), error.exit_code)
    elif isinstance(error, DfqError):
        _report(type(error).__name__, str(error))
        _fail(str(error), error.exit_code)
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        place = f": {error.filename!r}" if error.filename else ""
        message = f"{error.strerror or error}{place}."
        _report("OSError", message)
        _fail(message, OSERROR)
    elif is_out_of_memory(error):
        smaller = "model or --img-size, or in a recipe a smaller unit_size or batch"
        advice = f"Use a smaller {smaller if verb in KEEPS else 'model, or more memory'}."
        message = f"Out of memory ({first_line(error)}). {advice}"
        _report("MemoryError", message)
        _fail(message, 1)


def _fail(message: str, code: int) -> NoReturn:
    err_console.print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code) from None


def _report(kind: str, message: str) -> None:
    """The object that ``--json`` promises, where there is no result."""
    if wants_json() and is_first():
        with suppress(OutputError, BrokenPipeError):
            print_json({"error": {"type": kind, "message": message}})
