"""Datasets of inverted images for given settings: made, resumed or found in the cache."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import torch

from dfq.cache import cache_directory
from dfq.data.dataset import DIRECTORY, DatasetWriter, SparseImageDataset
from dfq.data.settings import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SETTINGS,
    cache_key,
    grid_to_json,
    read_settings,
)
from dfq.device import resolve_products
from dfq.environment import versions
from dfq.errors import DatasetError
from dfq.files import make_directory, safe_name
from dfq.inversion import ALGORITHM_VERSION, Engine, objective_of, plan_units, ranking_of
from dfq.inversion.objective import check_classes
from dfq.inversion.schedule import unused_fields
from dfq.inversion.units import units_of
from dfq.ownership import remove_directory
from dfq.pipeline.workers import Workers
from dfq.progress import Progress
from dfq.recipe import InversionSettings, to_dict
from dfq.vit.architecture import to_json as describe
from dfq.vit.load import LoadedModel

IDLE = 3600.0
"""Seconds without writes after which an unfinished dataset counts as abandoned."""

_ALWAYS = frozenset(
    {
        *("method", "images", "stages", "iterations", "lr", "beta1", "beta2", "tv", "jitter"),
        *("flip", "importance", "plateau", "prune_at", "prune_share", "unit_size", "seed"),
        "precision",
    }
)
"""Settings that are always recorded.  Others are recorded only if they differ from the default, so
that datasets made before they existed are still found."""


def make_dataset(
    loaded: LoadedModel,
    settings: InversionSettings,
    *,
    out: Path | None,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
    purpose: str = "",
) -> tuple[SparseImageDataset, bool]:
    """Open the dataset of these settings; missing images are inverted.

    Returns the dataset and whether it was complete before.  ``purpose``: word for progress
    messages, such as the kind of images.

    Raises:
        SettingError: ``classes`` names one that the model does not have.
    """
    check_classes(loaded.vit.arch, settings.classes)
    resolved = dataclasses.replace(
        settings,
        precision=cast(Any, resolve_products(settings.precision, device)),
        threads=settings.threads or torch.get_num_threads(),
        importance=ranking_of(settings, loaded.vit.arch) or settings.importance,
    )
    units = plan_units(resolved, loaded.vit.arch.grid.patches)
    facts = _dataset_settings(loaded, resolved, device)
    path = out or _cached_path(loaded, resolved, facts, cache)
    workers = Workers()
    before = _finished(path, facts)
    if before is not None:
        progress.note(f"Found {len(before)} {purpose}images in {path}")
        return before, True
    if workers.first:
        facts, resolved = _resume(path, facts, resolved, in_cache=out is None)
        DatasetWriter(path, facts)
    workers.wait()
    facts, resolved = _resume(path, facts, resolved, in_cache=False)
    writer = DatasetWriter(path, facts)
    assigned = workers.share(units)
    missing = [unit for unit in assigned if not writer.has(unit.index, unit.shards)]
    if len(missing) < len(assigned):
        progress.note(f"Resuming: {len(assigned) - len(missing)} of {len(assigned)} units are done")
    workers.wait()
    if missing:
        engine = Engine(loaded.vit, loaded.preprocessing, resolved, device)
        steps = len(missing) * engine.events[-1].iteration
        name = f"Inverting {resolved.images} {purpose}images ({resolved.method})"
        with progress.task(name, max(1, steps)) as advance:
            for unit in missing:
                writer.write(unit.index, engine.run(unit, advance))
    workers.wait()
    if workers.first:
        writer.finish([unit.shards for unit in units])
    workers.wait()
    return SparseImageDataset(path), False


def _dataset_settings(
    loaded: LoadedModel, settings: InversionSettings, device: torch.device
) -> dict[str, Any]:
    """Return the content of ``settings.json``."""
    relevant = to_dict(settings)
    threads = relevant.pop("threads")
    default = to_dict(InversionSettings())
    unchanged = {n for n in {*relevant} - _ALWAYS if relevant[n] == default[n]}
    for name in unused_fields(settings.method) | unchanged:
        del relevant[name]
    facts = dataset_facts(loaded, relevant, threads, machine_of(device))
    if units_of(loaded.preprocessing) is not loaded.preprocessing:
        facts["units"] = "input range"
    return facts


def dataset_facts(
    loaded: LoadedModel, inversion: dict[str, Any], threads: int, machine: str
) -> dict[str, Any]:
    """Return the content of ``settings.json`` for images of a model with ``inversion`` settings."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "algorithm_version": ALGORITHM_VERSION,
        "model": {
            "name": loaded.timm_name,
            "architecture": describe(loaded.vit.arch),
            "fingerprint": loaded.fingerprint,
        },
        "preprocessing": {
            k: v
            for k, v in describe(loaded.preprocessing).items()
            if k in ("mean", "std", "input_range")
        },
        "grid": grid_to_json(loaded.vit.arch.grid),
        "objective": objective_of(loaded.vit.arch),
        "inversion": inversion,
        "threads": threads,
        "machine": machine,
        "versions": versions(),
    }


def machine_of(device: torch.device) -> str:
    """Describe the device's kernels, which determine rounding: device type and capability."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _cached_path(
    loaded: LoadedModel,
    settings: InversionSettings,
    facts: dict[str, Any],
    cache: str | Path | None,
) -> Path:
    name = safe_name(loaded.timm_name)
    key = cache_key(facts)
    root = cache_directory(cache) / "datasets"
    make_directory(root)
    return root / f"{name}-{settings.method}-{settings.images}-{key[:16]}"


def _finished(path: Path, facts: dict[str, Any]) -> SparseImageDataset | None:
    """Open the dataset at ``path`` if it is complete and matches ``facts``; else return None."""
    if not (path / MANIFEST).is_file():
        return None
    dataset = SparseImageDataset(path)
    return dataset if cache_key(dataset.settings) == cache_key(facts) else None


def _resume(
    path: Path, facts: dict[str, Any], settings: InversionSettings, *, in_cache: bool
) -> tuple[dict[str, Any], InversionSettings]:
    """Adopt the recorded number of threads of an unfinished run, so that its bytes are the same.

    In the cache, an unfinished run of another machine or other versions is restarted.

    Raises:
        DatasetError: that run may still be going on.
    """
    if not (path / SETTINGS).is_file():
        return facts, settings
    before = read_settings(path)
    if cache_key(before) != cache_key(facts):
        return facts, settings
    if any(before.get(name) != facts[name] for name in ("versions", "machine")):
        if in_cache:
            _remove_idle(path)
        return facts, settings
    threads = before.get("threads")
    if not isinstance(threads, int) or threads < 1:
        raise DatasetError(f"{str(path)!r}: settings.json has no valid number of threads.")
    return before, dataclasses.replace(settings, threads=threads)


def _remove_idle(path: Path) -> None:
    """Remove an unfinished dataset without writes for :data:`IDLE` seconds."""
    idle = time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir()))
    if idle < IDLE:
        raise DatasetError(
            f"{str(path)!r} is unfinished, was begun on another machine or with other versions of "
            f"the libraries, and was written to {max(0, idle) / 60:.0f} minutes ago. If that run "
            f"is over, remove what it left with `dfq cache remove {path.name}`; if it is not, wait "
            "for it or use another cache."
        )
    remove_directory(path, DIRECTORY)
