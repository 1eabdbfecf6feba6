"""What lies below a directory."""

from __future__ import annotations

from pathlib import Path


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file with its content, every directory with None."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }
