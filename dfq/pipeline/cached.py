"""What the cache directory holds: datasets, engines' files of checkpoints, speeds of kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

from dfq.arguments import checked
from dfq.cache import CacheEntry, cache_directory
from dfq.data.cache import list_datasets
from dfq.engines.cached import list_engines
from dfq.errors import DatasetError
from dfq.files import explain
from dfq.runtime.speeds import list_speeds


@checked
def list_cache(cache: str | Path | None = None) -> list[CacheEntry]:
    """List the cache by name: datasets, then checkpoints that engines have files of.

    Raises:
        DatasetError: the cache is a file.
    """
    return _entries(cache)


@checked
def verify_cache(cache: str | Path | None = None) -> list[CacheEntry]:
    """List the cache as :func:`list_cache` does, and verify the checksum of every file."""
    return _entries(cache, verify=True)


@checked
def remove_cached(name: str, cache: str | Path | None = None) -> list[CacheEntry]:
    """Remove an entry of the cache by name or unique prefix, or all entries with ``"all"``.

    Raises:
        DatasetError: no entry, or more than one, has that name or prefix.
        OutputError: an entry cannot be removed.
    """
    entries = _entries(cache)
    exact = [e for e in entries if e.name == name]
    chosen = entries if name == "all" else exact or [e for e in entries if e.name.startswith(name)]
    if name != "all" and (not name or len(chosen) != 1):
        known = ", ".join(e.name for e in entries) or "none"
        what = "No entry" if not chosen or not name else f"{len(chosen)} entries"
        raise DatasetError(f"{what} in the cache with a name of {name!r}; there are: {known}.")
    for entry in chosen:
        try:
            place = Path(entry.path)
            place.unlink() if place.is_file() else shutil.rmtree(place)
        except OSError as error:
            raise explain(error, Path(entry.path)) from error
    return chosen


def _entries(cache: str | Path | None, verify: bool = False) -> list[CacheEntry]:
    root = cache_directory(cache)
    return [*list_datasets(root, verify), *list_engines(root, verify), *list_speeds(root)]
