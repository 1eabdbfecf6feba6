"""Report of stored results as Markdown; only the JSON files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration_bench.core.plotting import draw_plots
from calibration_bench.core.records import Store
from calibration_bench.core.registry import ENTRIES, Entry, Table
from dfq.errors import DataError


def report(directory: Path, plots: Path | None = None) -> str:
    """All experiments with results in a directory; with ``plots`` also their plots, as PNG
    files in that directory.

    Raises:
        DataError: there is none, or a file is damaged.
        UsageError: there are plots to draw, and matplotlib is not installed.
    """
    stored = [e for e in ENTRIES if (directory / f"{e.name}.json").is_file()]
    if not stored:
        raise DataError(f"{str(directory)!r} holds no results; `run` an experiment first.")
    sections = [_section(entry, Store(directory, entry.name), plots) for entry in stored]
    return "\n\n".join(sections) + "\n"


def _section(entry: Entry, store: Store, plots: Path | None) -> str:
    content = store.read()
    rows = store.rows()
    parts = [f"## {entry.name}", entry.line + "."]
    experiment = entry.load()
    parts += [markdown(table) for table in experiment.tables(rows) if table.rows]
    if plots is not None:
        drawn = [plot for plot in experiment.plots(rows) if plot.curves]
        paths = draw_plots(drawn, plots)
        parts += [f"![{d.title}]({p.as_posix()})" for d, p in zip(drawn, paths, strict=True)]
    used = {row["session"] for row in rows}
    parts += [_session(n, s) for n, s in content["sessions"].items() if n in used]
    unfinished = sum(not row["complete"] for row in rows)
    if unfinished:
        parts.append(f"{unfinished} rows are incomplete.")
    return "\n\n".join(parts)


def _session(name: str, session: dict[str, Any]) -> str:
    machine, versions = session["hardware"], session["versions"]
    memory = machine.get("memory_bytes") or 0
    return (
        f"Session {name}, {session['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {memory / 2**30:.0f} GiB, "
        f"{machine['torch_capability']}; torch {versions['torch']}, timm {versions['timm']}, "
        f"dfq {versions['dfq']} (code {versions['dfq_code']}); seed {session['seed']}; "
        f"`{session['command']}`."
    )


def markdown(table: Table) -> str:
    """Return a table with its title as Markdown."""
    header = list(table.columns.values())
    lines = [header, ["---"] * len(header)]
    lines += [[cell(row.get(key)) for key in table.columns] for row in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}**\n\n{body}{note}"


def cell(value: Any) -> str:
    """Format a value with four significant digits; None as an empty string."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(v) for v in value)
    return str(value).replace("|", "\\|")
