"""The command line: ``list``, ``run NAME``, ``report``, ``rescale``."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from typer.core import TyperGroup

from calibration_bench.core import registry
from calibration_bench.core.notes import Lines
from calibration_bench.core.options import function
from calibration_bench.core.report import markdown, report
from dfq.cli.flags import JSON, has_flag, keep_json, parsed_json, wants_json
from dfq.cli.streams import settle
from dfq.cli.terminal import check_output, print_json, print_text
from dfq.errors import DfqError, OutputError
from dfq.text import escape

err_console = Console(stderr=True, highlight=False, soft_wrap=True)

Results = Annotated[Path, typer.Option(help="Directory of the results.")]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object on stdout, nothing else.",
        is_eager=True,
        callback=parsed_json,
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Measure also the rows already there.")]
Plots = Annotated[
    Path | None, typer.Option(help="Draw plots into this directory; takes the extra `report`.")
]
Jobs = Annotated[
    int | None,
    typer.Option(help="Experiments at once, sharing the threads.", show_default="a thread each"),
]
DEFAULT_RESULTS = Path("bench-results")


ALL = "all"
ALL_HELP = "Every experiment that runs on the demo model, with its defaults."


class _Group(TyperGroup):
    """Turns dfq's errors into messages and exit codes."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        as_json = has_flag(args, JSON)
        ctx = super().make_context(info_name, args, parent, **extra)
        keep_json(ctx, as_json)
        return ctx

    def invoke(self, ctx: Any) -> Any:
        try:
            check_output(json=wants_json(ctx), quiet=False)
            return super().invoke(ctx)
        except DfqError as error:
            if wants_json(ctx):
                kind = type(error).__name__
                with suppress(OutputError):
                    print_json({"error": {"type": kind, "message": str(error)}})
            err_console.print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            text = "Interrupted. Finished rows are kept; run it again to go on."
            if wants_json(ctx):
                print_json({"error": {"type": "KeyboardInterrupt", "message": text}})
            err_console.print(text)
            raise typer.Exit(130) from None


class _Experiments(TyperGroup):
    """The registry's experiments as commands, imported when one is called."""

    def list_commands(self, _: Any) -> list[str]:
        return [*(e.name for e in registry.ENTRIES), ALL]

    def get_command(self, _: Any, cmd_name: str) -> Any:
        if cmd_name == ALL:
            return _command(ALL, ALL_HELP, _run_all)
        entry = registry.entry(cmd_name)
        shared = {
            "json_": (Json, False),
            "results": (Results, DEFAULT_RESULTS),
            "again": (Again, False),
        }

        def body(options: Any, json_: bool, results: Path, again: bool) -> None:
            _run(entry, options, json_, results, again)

        text = f"{entry.line}. Needs: {entry.needs}."
        return _command(cmd_name, text, function(entry.load().options, body, shared))


def _command(name: str, text: str, body: Any) -> Any:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=text)(body)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Group,
    name="calibration_bench",
    help="Measure inversion and calibration, keep every measurement, and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs = typer.Typer(cls=_Experiments, no_args_is_help=True, help="Run an experiment.")
app.add_typer(runs, name="run")


@runs.callback()
def _runs() -> None:
    """Run an experiment; what is there already is not measured again."""


@app.command("list")
def list_(json_: Json = False) -> None:
    """List the experiments: name, what it answers, what it needs."""
    if json_:
        print_json({"rows": [dataclasses.asdict(e) for e in registry.ENTRIES]})
        return
    table = RichTable("name", "what it answers", "needs")
    for entry in registry.ENTRIES:
        table.add_row(entry.name, entry.line, entry.needs)
    print_text(table)


@app.command("report")
def report_(results: Results = DEFAULT_RESULTS, plots: Plots = None) -> None:
    """Render the stored results as Markdown tables, and as plots where a place is named."""
    _write(report(results, plots))


@app.command("rescale")
def rescale_(
    weights: Annotated[Path, typer.Argument(help="A timm ViT's weights, safetensors.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    seed: Annotated[int, typer.Option(help="Of the factors.")] = 0,
) -> None:
    """Write weights of the same function whose channels differ in size up to 100 times."""
    from calibration_bench.core.rescale import rescale_file

    rescale_file(weights, out, seed)


def _run(entry: registry.Entry, options: Any, json_: bool, results: Path, again: bool) -> None:
    from calibration_bench.core.runner import run

    outcome = run(entry, options, results, Lines(), again=again)
    if json_:
        print_json(outcome)
    else:
        _print_tables(outcome)


def _run_all(
    json_: Json = False,
    results: Results = DEFAULT_RESULTS,
    again: Again = False,
    jobs: Jobs = None,
) -> None:
    """Each experiment's tables are printed as it ends; with --json one object at the end."""
    from calibration_bench.core.everything import run_all

    found = {}
    for outcome in run_all(results, Lines(), again=again, jobs=jobs):
        found[outcome["experiment"]] = outcome
        if not json_:
            _print_tables(outcome)
    if json_:
        print_json(found)


def _print_tables(outcome: dict[str, Any]) -> None:
    tables = [markdown(registry.Table(**table)) for table in outcome["tables"]]
    _write("\n\n".join(tables) + "\n")
    err_console.print(f"Kept in {outcome['results']}", soft_wrap=True)


def _write(text: str) -> None:
    print_text(text, end="", markup=False, emoji=False, soft_wrap=True)


def main() -> None:
    """Entry point of ``python -m calibration_bench``."""
    settle()
    app()
