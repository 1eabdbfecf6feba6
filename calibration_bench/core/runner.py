"""Runner of experiments: measures missing rows and stores each at once."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from calibration_bench.core.hardware import hardware, versions
from calibration_bench.core.records import Store, command_line, flat, now
from calibration_bench.core.registry import Bench, Entry, Experiment, Key, Notes


def run(
    entry: Entry, options: Any, results: Path, notes: Notes, *, again: bool = False
) -> dict[str, Any]:
    """Measure the rows that are not stored yet; return rows, tables and session.

    ``again``: also measure stored rows again.  Output of the measured code goes to stderr.
    """
    experiment, store, bench = entry.load(), Store(results, entry.name), Bench(results, notes)
    planned = experiment.plan(options, bench)
    session = _session(options)
    missing = [key for key in planned if again or not _done(store, key)]
    if len(missing) < len(planned):
        notes.note(f"{len(planned) - len(missing)} of {len(planned)} rows are stored already")
        _warn_of_other_code(store, planned, session["versions"]["dfq_code"], notes)
    if missing:
        _measure(experiment, options, missing, bench, store, session)
    return _outcome(entry, experiment, store, planned, session)


def _measure(
    experiment: Experiment,
    options: Any,
    missing: list[Key],
    bench: Bench,
    store: Store,
    session: dict[str, Any],
) -> None:
    name = store.begin(session)
    with contextlib.redirect_stdout(sys.stderr):
        for measured in experiment.measure(options, missing, bench):
            store.put(measured, name)


def _done(store: Store, key: Key) -> bool:
    entry = store.find(key)
    return entry is not None and bool(entry["complete"])


def _session(options: Any) -> dict[str, Any]:
    """Return the facts that all rows of this run share."""
    return {
        "date": now(),
        "command": command_line(),
        "seed": getattr(options, "seed", getattr(options, "seeds", None)),
        "hardware": hardware(),
        "versions": versions(),
        "options": {k: _plain(v) for k, v in dataclasses.asdict(options).items()},
    }


def _plain(value: Any) -> Any:
    """Shorten paths to their last part, to keep private directories out of the results."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and value.startswith("/"))
    return Path(value).name if is_path else value


def _warn_of_other_code(store: Store, planned: list[Key], code: str, notes: Notes) -> None:
    sessions = store.read()["sessions"]
    entries = [e for e in map(store.find, planned) if e is not None and e["complete"]]
    other = [e for e in entries if sessions[e["session"]]["versions"]["dfq_code"] != code]
    if other:
        notes.note(
            f"{len(other)} of them were measured with other code of dfq; --again repeats them"
        )


def _outcome(
    entry: Entry, experiment: Experiment, store: Store, planned: list[Key], session: dict[str, Any]
) -> dict[str, Any]:
    entries = [e for e in map(store.find, planned) if e is not None]
    rows = [flat(e) for e in entries]
    return {
        "experiment": entry.name,
        "rows": rows,
        "tables": [dataclasses.asdict(t) for t in experiment.tables(rows) if t.rows],
        "results": str(store.path),
        "session": session,
    }
