"""What a dataset or checkpoint holds, which models there are, and what this machine can do."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfq import checkpoint, demo, runtime
from dfq.cache import cache_directory
from dfq.dataset import SETTINGS, SparseImageDataset
from dfq.device import cpu_has, resolve_precision
from dfq.errors import DatasetError, UnknownModelError, nearest
from dfq.pipeline import versions
from dfq.quantization.scheme import scheme_name
from dfq.recipe import to_dict
from dfq.runtime import opaque
from dfq.vit.architecture import to_json


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts about a sparse-image dataset or a checkpoint, as JSON types.

    Datasets are verified: every shard is read and compared with its checksum.

    Raises:
        DatasetError: the path is neither, or its files are damaged.
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    if (path / SETTINGS).is_file():
        return _inspect_dataset(path)
    if (path / checkpoint.CONFIG).is_file():
        return _inspect_checkpoint(path)
    what = "holds neither" if path.exists() else "does not exist; expected"
    raise DatasetError(f"{str(path)!r} {what} a sparse-image dataset or a dfq checkpoint.")


def _inspect_dataset(path: Path) -> dict[str, Any]:
    dataset = SparseImageDataset(path)
    dataset.verify()
    grid = dataset.grid
    kept = sum(shard.images * shard.patches for shard in dataset.shards)
    return {
        "kind": "dataset",
        "path": str(path),
        "model": dataset.settings.get("model", {}).get("name"),
        "fingerprint": dataset.fingerprint,
        "method": dataset.method,
        "images": len(dataset),
        "grid": [grid.rows, grid.columns],
        "patches_per_image": sorted({shard.patches for shard in dataset.shards}),
        "sparsity": 1 - kept / (len(dataset) * grid.patches),
        "shards": len(dataset.shards),
        "bytes": dataset.bytes,
        "inversion": dataset.settings.get("inversion"),
        "threads": dataset.settings.get("threads"),
        "versions": dataset.settings.get("versions"),
    }


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    info = checkpoint.read_info(path)
    model = checkpoint.load(path)
    report_path = path / checkpoint.REPORT
    report: Any = None
    if report_path.is_file():
        try:
            report = json.loads(report_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            report = None
    return {
        "kind": "checkpoint",
        "path": str(path),
        "model": info.model,
        "scheme": scheme_name(info.recipe.quantization),
        "attention": info.recipe.quantization.attention,
        "backend": model.backend,
        "compiler": opaque.compiler(),
        "architecture": to_json(info.arch),
        "preprocessing": to_json(info.preprocessing),
        "recipe": to_dict(info.recipe),
        "source": info.source,
        "bytes": (path / checkpoint.MODEL).stat().st_size,
        "report": report,
    }


@dataclass(frozen=True)
class ModelEntry:
    """A name that :func:`dfq.load_model` takes; ``kind`` is demo, alias or timm."""

    name: str
    kind: str
    pretrained: bool


HOMES = ("vision_transformer", "deit", "beit", "eva")
"""Modules of timm that define models which may be supported."""


def models(pattern: str | None = None) -> list[ModelEntry]:
    """The names of models: demo, aliases, and timm's vision transformers.

    ``pattern`` keeps names that contain it.  timm's names are those of its
    modules of patch transformers; whether a member is supported shows when it is loaded.

    Raises:
        UnknownModelError: no name contains the pattern.
    """
    import timm

    from dfq.vit.load import ALIASES

    names = sorted({name for home in HOMES for name in timm.list_models(module=home)})
    entries = [
        ModelEntry("demo", "demo", True),
        *(ModelEntry(alias, "alias", True) for alias in ALIASES),
        *(ModelEntry(name, "timm", bool(timm.is_model_pretrained(name))) for name in names),
    ]
    found = [e for e in entries if pattern is None or pattern in e.name]
    if not found:
        raise UnknownModelError(
            f"No model's name contains {pattern!r}.{nearest(pattern or '', names)}"
        )
    return found


@dataclass(frozen=True)
class DoctorReport:
    """What this machine offers; ``problems`` is empty where all is well.

    ``backend`` names the kernels that checkpoints run on, ``compiler`` the C++ compiler that
    ``dfq.load(..., compiled=True)`` would use, None where there is none.
    """

    versions: dict[str, str]
    processor: str
    instructions: tuple[str, ...]
    threads: int
    devices: tuple[str, ...]
    backend: str
    compiler: str | None
    precision: str
    cache: str
    problems: tuple[str, ...]


def doctor(cache: str | Path | None = None) -> DoctorReport:
    """Look at versions, processor, integer kernels, cache directory and demo files."""
    cpu = torch.device("cpu")
    backend = runtime.select(cpu).NAME
    root = cache_directory(cache)
    problems = []
    if backend == "reference":
        problems.append(
            "This processor has no 8-bit dot products (VNNI): quantized models run on the "
            "reference kernels, which are correct and slow."
        )
    if not _writable(root):
        problems.append(f"The cache directory {root} cannot be written; use --cache or $DFQ_CACHE.")
    problems += [f"{p.name} is missing; reinstall dfq." for p in _missing_demo_files()]
    return DoctorReport(
        versions=versions(),
        processor=_processor(),
        instructions=_instructions(),
        threads=torch.get_num_threads(),
        devices=("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))),
        backend=backend,
        compiler=opaque.compiler(),
        precision=resolve_precision("auto", cpu),
        cache=str(root),
        problems=tuple(problems),
    )


def _missing_demo_files() -> list[Path]:
    return [p for p in (demo.WEIGHTS, demo.TEST_SLICE) if not p.is_file()]


def _writable(path: Path) -> bool:
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK) and path.is_dir()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _instructions() -> tuple[str, ...]:
    return tuple(
        name for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile") if cpu_has(name)
    )
