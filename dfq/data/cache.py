"""Cache of sparse-image datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dfq.arguments import checked
from dfq.cache import cache_directory
from dfq.data.dataset import DIRECTORY, SHARD_NAME, SparseImageDataset
from dfq.data.settings import FORMAT, MANIFEST, SETTINGS, read_settings
from dfq.errors import DatasetError
from dfq.ownership import check_removable, remove_directory


@dataclass(frozen=True)
class CacheEntry:
    """Dataset in the cache; ``problem``: why it cannot be used, or None."""

    name: str
    path: str
    model: str
    method: str
    images: int
    bytes: int
    problem: str | None


@checked
def list_cache(cache: str | Path | None = None) -> list[CacheEntry]:
    """List the datasets in the cache by name.

    Raises:
        DatasetError: the cache is a file.
    """
    root = cache_directory(cache) / "datasets"
    if not root.is_dir():
        place = next((p for p in (root, root.parent) if p.exists() and not p.is_dir()), None)
        if place is not None:
            raise DatasetError(f"The cache {str(place)!r} is a file, not a directory.")
        return []
    return [_entry(p) for p in sorted(root.iterdir()) if _is_ours(p)]


def _is_ours(path: Path) -> bool:
    """Whether a directory is a dataset written by dfq, even if unfinished or damaged."""
    try:
        settings = path / SETTINGS
        named = settings.is_file() and FORMAT in settings.read_text("utf-8", errors="replace")
        return named or any(SHARD_NAME.fullmatch(p.name) for p in path.iterdir())
    except OSError:
        return False


@checked
def verify_cache(cache: str | Path | None = None) -> list[CacheEntry]:
    """List the cache as :func:`list_cache` does, and verify the checksum of every file."""
    return [_entry(Path(e.path), verify=True) for e in list_cache(cache)]


@checked
def remove_cached(name: str, cache: str | Path | None = None) -> list[CacheEntry]:
    """Remove a dataset by name or unique prefix, or all datasets with ``"all"``.

    Of a link, which a user has put there, the link is removed and its target kept.

    Raises:
        DatasetError: no dataset, or more than one, has that name or prefix.
        OutputError: a dataset cannot be removed, or holds other files; none is removed then.
    """
    entries = list_cache(cache)
    exact = [e for e in entries if e.name == name]
    chosen = entries if name == "all" else exact or [e for e in entries if e.name.startswith(name)]
    if name != "all" and (not name or len(chosen) != 1):
        known = ", ".join(e.name for e in entries) or "none"
        what = "No dataset" if not chosen or not name else f"{len(chosen)} datasets"
        raise DatasetError(f"{what} in the cache with a name of {name!r}; there are: {known}.")
    for entry in chosen:
        check_removable(Path(entry.path), DIRECTORY)
    for entry in chosen:
        remove_directory(Path(entry.path), DIRECTORY)
    return chosen


def _entry(path: Path, verify: bool = False) -> CacheEntry:
    size = sum(p.stat().st_size for p in path.iterdir() if p.is_file())
    model = method = "?"
    images, problem = 0, None
    try:
        settings = read_settings(path)
        model = str(settings.get("model", {}).get("name", "?"))
        method = str(settings.get("inversion", {}).get("method", "?"))
        dataset = SparseImageDataset(path)
        images = len(dataset)
        if verify:
            dataset.verify()
    except DatasetError as error:
        unfinished = (path / SETTINGS).is_file() and not (path / MANIFEST).is_file()
        problem = "unfinished" if unfinished else str(error)
    return CacheEntry(path.name, str(path), model, method, images, size, problem)
