"""Results on disk: one JSON file per experiment, rewritten atomically with every new row."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from calibration_bench.core.registry import Key, Measured, Row
from dfq.errors import DataError
from dfq.files import check_writable, write_json

FORMAT = "dfq-bench"
FORMAT_VERSION = 2
"""In version 1 the keys have no ``reduce_range``."""

FULL_RANGE_IN_VERSION_1 = (
    "calibration-sources",
    "inversion-quality",
    "quantization-accuracy",
    "rebirth",
)
"""Experiments whose rows in version 1 were measured without ``reduce_range``."""

ENTRY_FIELDS = {"key", "row", "complete", "session", "measured"}
"""Fields of a stored row."""


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Store:
    """File with the rows of one experiment, each with its key and the session that measured it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.json"
        self.name = name

    def read(self) -> dict[str, Any]:
        """Return the content of the file; an empty store if it does not exist.

        Raises:
            DataError: the file is damaged or of another format.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _empty(self.name)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{str(self.path)!r} cannot be read as results: {error}.") from error
        known = [(FORMAT, version) for version in range(1, FORMAT_VERSION + 1)]
        if not isinstance(content, dict) or (
            (content.get("format"), content.get("format_version")) not in known
        ):
            raise DataError(
                f"{str(self.path)!r} has another format than {FORMAT} 1 to {FORMAT_VERSION}."
            )
        if not _is_valid(content):
            raise DataError(
                f"{str(self.path)!r} has malformed rows or sessions. Move it away, or choose "
                "another --results."
            )
        return _upgraded(content)

    def rows(self) -> list[Row]:
        """Return all rows in the order of their first measurement."""
        return [flat(entry) for entry in self.read()["rows"]]

    def find(self, key: Key) -> dict[str, Any] | None:
        """Return the stored entry of a key; None if there is none."""
        return next((e for e in self.read()["rows"] if e["key"] == key), None)

    def begin(self, session: dict[str, Any]) -> str:
        """Store a session, the facts that all rows of a run share; return its name."""
        check_writable(self.path.parent)
        with self._lock():
            content = self.read()
            name = str(1 + max((int(n) for n in content["sessions"]), default=0))
            content["sessions"][name] = session
            write_json(self.path, content)
        return name

    def put(self, measured: Measured, session: str) -> None:
        """Add a row, or replace the row of the same key."""
        entry = {
            "key": measured.key,
            "row": measured.row,
            "complete": measured.complete,
            "session": session,
            "measured": now(),
        }
        with self._lock():
            content = self.read()
            places = [i for i, e in enumerate(content["rows"]) if e["key"] == measured.key]
            if places:
                content["rows"][places[0]] = entry
            else:
                content["rows"].append(entry)
            write_json(self.path, content)

    def _lock(self) -> FileLock:
        """Return the lock that a run holds while it changes the file."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"))


def _is_valid(content: dict[str, Any]) -> bool:
    """Whether every row has its fields and a session of this file."""
    rows, sessions = content.get("rows"), content.get("sessions")
    return (
        isinstance(rows, list)
        and isinstance(sessions, dict)
        and all(name.isdecimal() and isinstance(s, dict) for name, s in sessions.items())
        and all(
            isinstance(row, dict)
            and set(row) >= ENTRY_FIELDS
            and isinstance(row["key"], dict)
            and isinstance(row["row"], dict)
            and isinstance(row["session"], str)
            and row["session"] in sessions
            for row in rows
        )
    )


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a file to the current format version."""
    if content["format_version"] == 1 and content.get("experiment") in FULL_RANGE_IN_VERSION_1:
        for row in content["rows"]:
            row["key"]["reduce_range"] = False
    return {**content, "format_version": FORMAT_VERSION}


def flat(entry: dict[str, Any]) -> Row:
    """Return a row with the fields of its key, its measurements and its session."""
    about = {name: entry[name] for name in ("complete", "session", "measured")}
    return {**entry["key"], **entry["row"], **about}


def command_line() -> str:
    """Return the command line of this process, absolute paths shortened to their last part."""
    return " ".join(["calibration_bench", *map(_shortened, sys.argv[1:])])


def _shortened(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}.../{Path(value).name}" if os.path.isabs(value) else word


def _empty(name: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "experiment": name,
        "sessions": {},
        "rows": [],
    }
