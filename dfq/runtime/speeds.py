"""Speeds of kernels by the shape of a layer, measured once on a GPU and recorded in the cache.

``kernels/KEY.json`` in the cache directory holds the times of one card, driver and set of versions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfq._version import __version__
from dfq.cache import CacheEntry, cache_directory
from dfq.errors import OutputError
from dfq.files import make_directory, read_json, write_json
from dfq.ownership import FileFormat, check_file, remove_file
from dfq.runtime.params import LinearParams, OutputFormat
from dfq.runtime.qtype import QParams
from dfq.runtime.weights import StoredWeight

FORMAT = "dfq-kernel-speeds"

DIRECTORY = "kernels"

_NAME = re.compile(r"[0-9a-f]{32}\.json")
_FILE = FileFormat(
    "a record of kernels' speeds", lambda path: _NAME.fullmatch(path.name) is not None
)

ROWS = 4096
"""Tokens of the measured product: 20 images of 197."""

REPEATS = 5

Times = dict[str, float | None]
"""Seconds of a product by kernel; None of a kernel that fails."""


@dataclass(frozen=True)
class Kernels:
    """What packs a weight, and what multiplies by it."""

    prepack: Callable[[LinearParams], object]
    linear: Callable[[Tensor, LinearParams, object, OutputFormat], Tensor]


def seconds(
    device: torch.device, inputs: int, outputs: int, candidates: Mapping[str, Kernels]
) -> Times:
    """Return the seconds of a layer of this shape by kernel: recorded, or measured now and
    recorded."""
    identity = _identity(device)
    record = _record(identity, cache_directory())
    shape = f"{inputs}x{outputs}"
    if set(record.get(shape, ())) != set(candidates):
        record[shape] = {
            name: _measure(device, inputs, outputs, kernels) for name, kernels in candidates.items()
        }
        _save(identity, cache_directory(), record)
    return record[shape]


def _identity(device: torch.device) -> str:
    """Return what the times are of, as JSON."""
    facts = {
        "card": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dfq": __version__,
    }
    return json.dumps(facts, sort_keys=True)


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def record_path(identity: str, cache: Path) -> Path:
    """Return the file of a record."""
    return cache / DIRECTORY / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


@functools.cache
def _record(identity: str, cache: Path) -> dict[str, Times]:
    """Return the recorded times by shape; empty without, or if the file is damaged."""
    return read_record(record_path(identity, cache))


def read_record(path: Path) -> dict[str, Times]:
    """Return the times by shape in a file, empty if there is none or it is damaged."""
    try:
        content = read_json(path)
        record = content["seconds"]
        good = content["format"] == FORMAT and all(
            value is None or (isinstance(value, float) and value > 0)
            for times in record.values()
            for value in times.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return record if good else {}


def list_speeds(cache: Path) -> list[CacheEntry]:
    """List the records in a cache directory."""
    files = sorted((cache / DIRECTORY).glob("*.json"))
    return [_entry(path) for path in files if _NAME.fullmatch(path.name) and path.is_file()]


def check_removable(path: Path) -> None:
    """Raise :class:`OutputError` unless a file in the cache is a record, by its name."""
    check_file(path, _FILE)


def remove_speeds(path: Path) -> None:
    """Remove a record; of a link to one, the link.

    Raises:
        OutputError: it cannot be removed.
    """
    remove_file(path, _FILE)


def _entry(path: Path) -> CacheEntry:
    record, card = read_record(path), "?"
    if record:
        card = str(read_json(path).get("card", "?"))
    return CacheEntry(
        kind="kernels",
        name=path.stem,
        path=str(path),
        model=card,
        contents=tuple(f"speeds of {shape}" for shape in record),
        bytes=path.stat().st_size,
        problem=None if record else "damaged; measured again when needed",
    )


def _save(identity: str, cache: Path, record: dict[str, Times]) -> None:
    """Write the record; where the cache cannot be written, this process alone remembers."""
    path = record_path(identity, cache)
    content: dict[str, Any] = {"format": FORMAT, **json.loads(identity), "seconds": record}
    try:
        make_directory(path.parent)
        write_json(path, content)
    except OutputError:
        pass


@torch.no_grad()
def _measure(device: torch.device, inputs: int, outputs: int, kernels: Kernels) -> float | None:
    """Return the least seconds of a product, None if the kernel fails."""
    weight = torch.ones(outputs, inputs, dtype=torch.int8, device=device)
    ones = torch.ones(outputs, dtype=torch.float32, device=device)
    params = LinearParams(StoredWeight(weight, 8, inputs), ones, ones, QParams(1.0, 100))
    x = torch.ones(ROWS, inputs, dtype=torch.uint8, device=device)
    times = []
    try:
        packed = kernels.prepack(params)
        for _ in range(1 + REPEATS):
            _wait(device)
            start = time.perf_counter()
            kernels.linear(x, params, packed, OutputFormat())
            _wait(device)
            times.append(time.perf_counter() - start)
    except RuntimeError:  # cuBLAS refuses shapes and cards with several errors
        return None
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
