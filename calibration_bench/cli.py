"""Command line of the bench: ``list``, ``run NAME``, ``report``, ``rescale``."""

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
        help="Print one JSON object on stdout, nothing else.",
        is_eager=True,
        callback=parsed_json,
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Measure stored rows again.")]
Plots = Annotated[
    Path | None, typer.Option(help="Draw plots into this directory; needs the extra `report`.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Number of experiments that run at once and share the threads.",
        show_default="one per thread",
    ),
]
DEFAULT_RESULTS = Path("bench-results")


ALL = "all"
ALL_HELP = "Run every experiment that works with the demo model, with default options."


class _Group(TyperGroup):
    """Command group that turns dfq's errors into messages and exit codes."""

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
            text = "Interrupted. Finished rows are stored; run the command again to continue."
            if wants_json(ctx):
                print_json({"error": {"type": "KeyboardInterrupt", "message": text}})
            err_console.print(text)
            raise typer.Exit(130) from None


class _Experiments(TyperGroup):
    """Command group of the experiments; each is imported when it is called."""

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
    help="Measure inversion and calibration, store the measurements, and report them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs = typer.Typer(cls=_Experiments, no_args_is_help=True, help="Run an experiment.")
app.add_typer(runs, name="run")


@runs.callback()
def _runs() -> None:
    """Run an experiment; stored rows are not measured again."""


@app.command("list")
def list_(json_: Json = False) -> None:
    """List the experiments with their questions and requirements."""
    if json_:
        print_json({"rows": [dataclasses.asdict(e) for e in registry.ENTRIES]})
        return
    table = RichTable("name", "question", "needs")
    for entry in registry.ENTRIES:
        table.add_row(entry.name, entry.line, entry.needs)
    print_text(table)


@app.command("report")
def report_(results: Results = DEFAULT_RESULTS, plots: Plots = None) -> None:
    """Print the stored results as Markdown tables; draw plots if a directory is given."""
    _write(report(results, plots))


@app.command("rescale")
def rescale_(
    weights: Annotated[Path, typer.Argument(help="Weights of a timm ViT, a safetensors file.")],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    seed: Annotated[int, typer.Option(help="Random seed of the channel factors.")] = 0,
) -> None:
    """Rescale channels by 1/100 to 100 without changing the function of the model."""
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
    """Print each experiment's tables as it ends; with --json print one object at the end."""
    from calibration_bench.core.everything import run_all

    outcomes = {}
    for outcome in run_all(results, Lines(), again=again, jobs=jobs):
        outcomes[outcome["experiment"]] = outcome
        if not json_:
            _print_tables(outcome)
    if json_:
        print_json(outcomes)


def _print_tables(outcome: dict[str, Any]) -> None:
    tables = [markdown(registry.Table(**table)) for table in outcome["tables"]]
    _write("\n\n".join(tables) + "\n")
    err_console.print(f"Results: {outcome['results']}", soft_wrap=True)


def _write(text: str) -> None:
    print_text(text, end="", markup=False, emoji=False, soft_wrap=True)


def main() -> None:
    """Entry point of ``python -m calibration_bench``."""
    settle()
    app()
