"""Results on disk: one JSON file an experiment, replaced whole whenever a row is added."""

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
"""Version 1 differs in that keys lack ``reduce_range``."""

OF_FULL_RANGE = ("calibration-sources", "inversion-quality", "quantization-accuracy", "rebirth")
"""Experiments whose rows of version 1 were measured with weights of the full range."""

ENTRY = {"key", "row", "complete", "session", "measured"}
"""What is stored of a row."""


def now() -> str:
    """The time, in UTC to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Store:
    """The rows of one experiment, each with its key and the session that measured it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.json"
        self.name = name

    def read(self) -> dict[str, Any]:
        """The file's content; that of an empty one where there is none.

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
            raise DataError(f"{str(self.path)!r} holds no results of format {known[-1]}.")
        if not _whole(content):
            raise DataError(
                f"{str(self.path)!r} holds rows or sessions that this bench did not write. Move it "
                "away, or choose another --results."
            )
        return _of_this_version(content)

    def rows(self) -> list[Row]:
        """All rows, in the order in which they were first measured."""
        return [flat(entry) for entry in self.read()["rows"]]

    def find(self, key: Key) -> dict[str, Any] | None:
        """The stored entry of a key."""
        return next((e for e in self.read()["rows"] if e["key"] == key), None)

    def begin(self, session: dict[str, Any]) -> str:
        """Store what all rows of a run share; returns its name."""
        check_writable(self.path.parent)
        with self._alone():
            content = self.read()
            name = str(1 + max((int(n) for n in content["sessions"]), default=0))
            content["sessions"][name] = session
            write_json(self.path, content)
        return name

    def put(self, measured: Measured, session: str) -> None:
        """Add a row, or put it in the place of the one with its key."""
        entry = {
            "key": measured.key,
            "row": measured.row,
            "complete": measured.complete,
            "session": session,
            "measured": now(),
        }
        with self._alone():
            content = self.read()
            places = [i for i, e in enumerate(content["rows"]) if e["key"] == measured.key]
            if places:
                content["rows"][places[0]] = entry
            else:
                content["rows"].append(entry)
            write_json(self.path, content)

    def _alone(self) -> FileLock:
        """No other run of the bench changes the file meanwhile."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"))


def _whole(content: dict[str, Any]) -> bool:
    """Every row has its parts, and a session of this file."""
    rows, sessions = content.get("rows"), content.get("sessions")
    return (
        isinstance(rows, list)
        and isinstance(sessions, dict)
        and all(name.isdecimal() and isinstance(s, dict) for name, s in sessions.items())
        and all(
            isinstance(row, dict)
            and set(row) >= ENTRY
            and isinstance(row["key"], dict)
            and isinstance(row["row"], dict)
            and isinstance(row["session"], str)
            and row["session"] in sessions
            for row in rows
        )
    )


def _of_this_version(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of any version as this version has it."""
    if content["format_version"] == 1 and content.get("experiment") in OF_FULL_RANGE:
        for row in content["rows"]:
            row["key"]["reduce_range"] = False
    return {**content, "format_version": FORMAT_VERSION}


def flat(entry: dict[str, Any]) -> Row:
    """A row as it is shown: what decides it, what was measured, and when."""
    about = {name: entry[name] for name in ("complete", "session", "measured")}
    return {**entry["key"], **entry["row"], **about}


def command_line() -> str:
    """How this process was called; absolute paths by their last part."""
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
