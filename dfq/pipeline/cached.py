"""What the cache directory holds: datasets, engines' files of checkpoints, speeds of kernels."""

from __future__ import annotations

from pathlib import Path

from dfq.arguments import checked
from dfq.cache import CacheEntry, cache_directory
from dfq.data import cache as datasets
from dfq.engines import cached as engines
from dfq.errors import DatasetError
from dfq.runtime import speeds

_REMOVAL = {
    "dataset": (datasets.check_removable, datasets.remove_dataset),
    "engines": (engines.check_removable, engines.remove_engines),
    "kernels": (speeds.check_removable, speeds.remove_speeds),
}
"""Check and removal of an entry by its kind."""


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

    Of a link, which a user has put there, the link is removed and its target kept.

    Raises:
        DatasetError: no entry, or more than one, has that name or prefix.
        OutputError: an entry cannot be removed, or holds other files; none is removed then.
    """
    entries = _entries(cache)
    exact = [e for e in entries if e.name == name]
    chosen = entries if name == "all" else exact or [e for e in entries if e.name.startswith(name)]
    if name != "all" and (not name or len(chosen) != 1):
        known = ", ".join(e.name for e in entries) or "none"
        what = "No entry" if not chosen or not name else f"{len(chosen)} entries"
        raise DatasetError(f"{what} in the cache with a name of {name!r}; there are: {known}.")
    for entry in chosen:
        _REMOVAL[entry.kind][0](Path(entry.path))
    for entry in chosen:
        _REMOVAL[entry.kind][1](Path(entry.path))
    return chosen


def _entries(cache: str | Path | None, verify: bool = False) -> list[CacheEntry]:
    root = cache_directory(cache)
    return [
        *datasets.list_datasets(root, verify),
        *engines.list_engines(root, verify),
        *speeds.list_speeds(root),
    ]
