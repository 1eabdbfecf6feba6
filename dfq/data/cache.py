"""Cache of sparse-image datasets."""

from __future__ import annotations

from pathlib import Path

from dfq import ownership
from dfq.cache import CacheEntry, size_of, subdirectories
from dfq.data.dataset import DIRECTORY, SHARD_NAME, SparseImageDataset
from dfq.data.settings import FORMAT, MANIFEST, SETTINGS, read_settings
from dfq.errors import DatasetError

DATASETS = "datasets"


def list_datasets(cache: Path, verify: bool = False) -> list[CacheEntry]:
    """List the datasets in a cache directory by name; with ``verify``, compare checksums.

    Raises:
        DatasetError: the cache is a file.
    """
    return [_entry(p, verify) for p in subdirectories(cache / DATASETS) if _is_ours(p)]


def _is_ours(path: Path) -> bool:
    """Whether a directory is a dataset written by dfq, even if unfinished or damaged."""
    try:
        settings = path / SETTINGS
        named = settings.is_file() and FORMAT in settings.read_text("utf-8", errors="replace")
        return named or any(SHARD_NAME.fullmatch(p.name) for p in path.iterdir())
    except OSError:
        return False


def check_removable(path: Path) -> None:
    """Raise :class:`dfq.errors.OutputError` if a dataset's directory holds other files."""
    ownership.check_removable(path, DIRECTORY)


def remove_dataset(path: Path) -> None:
    """Remove a dataset from the cache; of a link to one, the link.

    Raises:
        OutputError: it cannot be removed.
    """
    ownership.remove_directory(path, DIRECTORY)


def _entry(path: Path, verify: bool) -> CacheEntry:
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
    return CacheEntry(
        kind="dataset",
        name=path.name,
        path=str(path),
        model=model,
        method=method,
        images=images,
        bytes=size_of(path),
        problem=problem,
    )
