"""Conversion of errors to messages, exit codes and JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from dfq.argument_names import flag_names
from dfq.cli.flags import JSON, QUIET, has_flag, keep_json, wants_json
from dfq.cli.interrupts import INTERRUPTED, MESSAGE
from dfq.cli.terminal import check_output, err_console, print_json
from dfq.errors import (
    BenchmarkError,
    BenchmarkInterrupt,
    DfqError,
    GateError,
    OutputError,
    UsageError,
)
from dfq.failures import first_line, is_out_of_memory
from dfq.progress import is_first
from dfq.text import escape

INVERTING = ("invert", "quantize", "distill")
"""Commands with inversion, which resumes after an interruption."""

OSERROR = 2

PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""The parser's exception for wrong usage, whose module differs between versions of typer."""


class Group(TyperGroup):
    """Command group that turns errors of the caller and of the machine into messages."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            message = MESSAGE
            if ctx.invoked_subcommand in INVERTING:
                message += " Finished units of inversion are kept; run the command again to resume."
            if not isinstance(error, BenchmarkInterrupt):  # its result has been printed
                _report("KeyboardInterrupt", message, wants_json(ctx))
            err_console.print(message)
            raise typer.Exit(INTERRUPTED) from None
        except (DfqError, PARSER_ERROR, MemoryError, RuntimeError, OSError) as error:
            explain(error, wants_json(ctx), ctx.parent is None, ctx.invoked_subcommand)
            raise

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Also handle errors before a command is reached."""
        if parent is not None or extra.get("resilient_parsing"):
            return super().make_context(info_name, args, parent, **extra)
        as_json = has_flag(args, JSON)
        try:
            check_output(json=as_json, quiet=has_flag(args, QUIET))
            _check_empty(args)
            ctx = super().make_context(info_name, args, **extra)
        except (DfqError, PARSER_ERROR, OSError) as error:
            explain(error, as_json)
            raise
        keep_json(ctx, as_json)
        return ctx

    def main(self, *args: Any, **options: Any) -> Any:
        """Also handle errors while the parser prints."""
        try:
            with flag_names():
                return super().main(*args, **{"prog_name": "dfq", **options})
        except (DfqError, OSError) as error:
            try:
                explain(error, as_json=False)
            except typer.Exit as ended:
                sys.exit(ended.exit_code)
            raise


def _check_empty(words: Sequence[str]) -> None:
    """Refuse empty arguments, which as paths would be the working directory."""
    for before, word in pairwise(["", *words]):
        flag, equals, value = word.partition("=")
        if not word or (flag.startswith("--") and equals and not value):
            name = flag or before
            what = name if name.startswith("-") else "An argument"
            raise UsageError(f"{what} is empty; leave it out, or give it a value.")


def explain(
    error: Exception, as_json: bool, outermost: bool = True, verb: str | None = None
) -> None:
    """Print the error and exit; return if the parser shows the error, or it needs no message."""
    if isinstance(error, PARSER_ERROR):
        if outermost:
            _report("UsageError", cast(Any, error).format_message(), as_json)
    elif isinstance(error, GateError | BenchmarkError):
        _fail(str(error), error.exit_code)
    elif isinstance(error, DfqError):
        _report(type(error).__name__, str(error), as_json)
        _fail(str(error), error.exit_code)
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        place = f": {error.filename!r}" if error.filename else ""
        message = f"{error.strerror or error}{place}."
        _report("OSError", message, as_json)
        _fail(message, OSERROR)
    elif is_out_of_memory(error):
        smaller = "model or --img-size, or in a recipe a smaller unit_size or batch"
        advice = f"Use a smaller {smaller if verb in INVERTING else 'model, or more memory'}."
        message = f"Out of memory ({first_line(error)}). {advice}"
        _report("MemoryError", message, as_json)
        _fail(message, 1)


def _fail(message: str, code: int) -> NoReturn:
    err_console.print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code) from None


def _report(kind: str, message: str, as_json: bool) -> None:
    """Print the error as the JSON object that ``--json`` promises."""
    if as_json and is_first():
        with suppress(OutputError, BrokenPipeError):
            print_json({"error": {"type": kind, "message": message}})
