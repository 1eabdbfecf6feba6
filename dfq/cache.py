"""The cache directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
