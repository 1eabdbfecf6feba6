"""Listing of engines' files and records in the cache, one entry a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dfq import ownership
from dfq.cache import CacheEntry, size_of, subdirectories
from dfq.engines.entries import SHORT, engines_directory, entry_format, is_whole, read_entry
from dfq.engines.sessions import ENGINES
from dfq.engines.tuning import read_record
from dfq.errors import OutputError
from dfq.files import read_json

_DIGEST = re.compile(f"[0-9a-f]{{{SHORT}}}")
_FILES = re.compile(f"({'|'.join(ENGINES)})-[0-9a-f]+")
_RECORDS = "choice-*.json"
_DIRECTORY = ownership.DirectoryFormat(
    "engines' files of a checkpoint", re.compile(r"choice-[0-9a-f]+\.json")
)


def list_engines(cache: Path, verify: bool = False) -> list[CacheEntry]:
    """List the checkpoints that engines have files or records of in a cache directory.

    With ``verify``, the files are compared with their SHA-256.

    Raises:
        DatasetError: the cache is a file.
    """
    places = subdirectories(engines_directory(cache))
    return [_entry(path, verify) for path in places if _DIGEST.fullmatch(path.name)]


def check_removable(path: Path) -> None:
    """Raise :class:`OutputError` if the directory of a checkpoint's engines holds other files."""
    if path.is_symlink():
        return
    entries = _entries(path)
    for entry in entries:
        ownership.check_removable(entry, _format_of(entry))
    foreign = set(ownership.foreign_names(path, _DIRECTORY)) - {entry.name for entry in entries}
    if foreign:
        raise OutputError(
            f"{str(path)!r} also holds {min(foreign)!r}, which dfq did not write. Nothing was "
            "removed; move that away."
        )


def remove_engines(path: Path) -> None:
    """Remove the files and records of a checkpoint's engines; of a link to them, the link.

    Raises:
        OutputError: they cannot be removed, or there are other files.
    """
    check_removable(path)
    if not path.is_symlink():
        for entry in _entries(path):
            ownership.remove_directory(entry, _format_of(entry))
    ownership.remove_directory(path, _DIRECTORY)


def _entries(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if _FILES.fullmatch(p.name) and p.is_dir())


def _format_of(entry: Path) -> ownership.DirectoryFormat:
    return entry_format(ENGINES[entry.name.partition("-")[0]])


def _entry(path: Path, verify: bool) -> CacheEntry:
    files = {p: read_entry(p) for p in _entries(path)}
    records = sorted(path.glob(_RECORDS))
    known = [*files.values(), *map(_content, records)]
    contents = [place.name.partition("-")[0] for place in files]
    batches = sorted({batch for record in records for batch in read_record(record)})
    if batches:
        contents.append(f"speeds at batch {', '.join(map(str, batches))}")
    return CacheEntry(
        kind="engines",
        name=path.name,
        path=str(path),
        model=_first(known, "model") or "?",
        checkpoint=_first(known, "checkpoint"),
        contents=tuple(contents),
        bytes=size_of(path),
        problem=_problem(files, records, verify),
    )


def _problem(files: dict[Path, dict[str, Any]], records: list[Path], verify: bool) -> str | None:
    damaged = [p.name for p, entry in files.items() if not _is_good(p, entry, verify)]
    damaged += [record.name for record in records if not read_record(record)]
    if not damaged:
        return None
    return f"damaged: {', '.join(damaged)}; written again when needed"


def _is_good(path: Path, entry: dict[str, Any], verify: bool) -> bool:
    names = ENGINES[path.name.partition("-")[0]].files
    if not verify:
        return bool(entry) and all((path / name).is_file() for name in names)
    return is_whole(path, entry, names)


def _content(record: Path) -> dict[str, Any]:
    try:
        content = read_json(record)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _first(known: list[dict[str, Any]], key: str) -> str | None:
    return next((entry[key] for entry in known if isinstance(entry.get(key), str)), None)
