"""The cache directory, and what listings say of its content."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dfq.errors import DatasetError


def cache_directory(path: str | Path | None = None) -> Path:
    """Return ``path``, else ``$DFQ_CACHE``, else ``dfq`` in the user's cache directory."""
    if path is not None:
        return Path(path)
    if os.environ.get("DFQ_CACHE"):
        return Path(os.environ["DFQ_CACHE"])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dfq"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Dataset in the cache, the files of engines for a checkpoint, or the speeds of a GPU's
    kernels; ``kind`` is ``dataset``, ``engines`` or ``kernels``.

    ``model``: name of the model, or of the GPU.  ``method`` and ``images``: of a dataset.
    ``checkpoint``: path that a checkpoint had when its files were written; ``contents``: the
    engines that have files and the batch sizes, or the shapes of layers, that speeds are recorded
    for.  ``problem``: why it cannot be used, or None.
    """

    kind: str
    name: str
    path: str
    model: str
    method: str | None = None
    images: int | None = None
    checkpoint: str | None = None
    contents: tuple[str, ...] = ()
    bytes: int
    problem: str | None


def subdirectories(root: Path) -> list[Path]:
    """Return what a directory of the cache holds, by name; nothing if it is missing.

    Raises:
        DatasetError: the cache is a file.
    """
    if not root.is_dir():
        place = next((p for p in (root, root.parent) if p.exists() and not p.is_dir()), None)
        if place is not None:
            raise DatasetError(f"The cache {str(place)!r} is a file, not a directory.")
        return []
    return sorted(path for path in root.iterdir() if path.is_dir())


def size_of(path: Path) -> int:
    """Return the size of all files below a directory in bytes."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
