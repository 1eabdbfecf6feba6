"""What a dataset or checkpoint holds, which models there are, and what this machine can do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfq import checkpoint, demo, runtime
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.cache import cache_directory
from dfq.catalog import ALIASES, TIMM_FAMILIES, known_names, read_catalog
from dfq.data.dataset import SparseImageDataset
from dfq.data.settings import SETTINGS
from dfq.device import resolve_precision
from dfq.engines.load import recorded_runtime
from dfq.environment import instructions, processor, versions
from dfq.errors import DatasetError, UnknownModelError, nearest
from dfq.files import read_json
from dfq.pipeline.inspect_model import inspect_model, preprocessing_facts
from dfq.pipeline.kernels import (
    KernelChoice,
    kernels_of_kinds,
    kernels_of_model,
    machine_devices,
)
from dfq.quantization.scheme import Scheme
from dfq.recipe import to_dict
from dfq.runtime import onednn, opaque
from dfq.runtime.params import KernelRequirements
from dfq.slow import slow_floats, slow_integers
from dfq.vit.architecture import PIXEL_RANGE, to_json
from dfq.vit.describe import describe
from dfq.vit.saved import REPORT, WEIGHTS, is_saved, read_saved


@checked
def inspect(
    path: str | Path,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
) -> dict[str, Any]:
    """Facts about a sparse-image dataset, a checkpoint, a student or a model, as JSON types.

    Datasets are verified: every shard is read and compared with its checksum.  Models are built
    without weights, unless a file of weights is given; nothing is downloaded for a name of timm's.

    Args:
        path: a dataset, a checkpoint or a student.  Where there is nothing of that name, or with
            one of the other arguments, a model: see :func:`dfq.load_model`.
        weights, num_classes, img_size, in_chans, global_pool: see :func:`dfq.load_model`.

    Raises:
        DatasetError: the path is none of them, or the dataset's files are damaged.
        CheckpointError: the checkpoint is damaged.
        WeightsError: the student or the weights are damaged.
        UnknownModelError: there is nothing of that name, and no model either.
    """
    options = {
        "num_classes": num_classes,
        "img_size": img_size,
        "in_chans": in_chans,
        "global_pool": global_pool,
    }
    if weights is not None or any(value is not None for value in options.values()):
        return inspect_model(str(path), weights, **options)
    place = Path(path)
    if (place / SETTINGS).is_file():
        return _inspect_dataset(place)
    if (place / checkpoint.CONFIG).is_file():
        return _inspect_checkpoint(place)
    if is_saved(place):
        return _inspect_student(place)
    if place.exists() or isinstance(path, Path) or _is_path(path):
        raise DatasetError(
            f"{str(path)!r} holds neither a sparse-image dataset nor a dfq checkpoint nor a "
            f"student.{_same_name(str(path))}"
            if place.exists()
            else f"{str(path)!r} does not exist; give a sparse-image dataset, a dfq checkpoint "
            "or a student, or the name of a model."
        )
    try:
        return inspect_model(path, None, **options)
    except UnknownModelError as error:
        raise UnknownModelError(f"There is no file or directory {path!r}, and: {error}") from error


def _same_name(name: str) -> str:
    known = name in known_names()
    return " To inspect the model of that name, do so in another directory." if known else ""


def _is_path(text: str) -> bool:
    """Whether text can only be a path, as models have no such names."""
    return ":" not in text and ("/" in text or os.sep in text)


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
        "preprocessing": {
            "input_range": list(PIXEL_RANGE),
            **dataset.settings.get("preprocessing", {}),
        },
        "inversion": dataset.settings.get("inversion"),
        "threads": dataset.settings.get("threads"),
        "versions": dataset.settings.get("versions"),
    }


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    info = checkpoint.read_info(path)
    kernels = kernels_of_model(checkpoint.load(path), machine_devices())
    return {
        "kind": "checkpoint",
        "path": str(path),
        "model": info.model,
        "scheme": Scheme(info.recipe.quantization).name,
        "attention": info.recipe.quantization.attention,
        "backend": ", ".join(sorted({e.backend for e in kernels if e.bits and e.device == "cpu"})),
        "kernels": [asdict(each) for each in kernels],
        "runtime": recorded_runtime(path),
        "compiler": opaque.compiler(),
        "architecture": to_json(info.arch),
        "preprocessing": preprocessing_facts(info.preprocessing),
        "recipe": to_dict(info.recipe),
        "source": info.source,
        "bytes": (path / checkpoint.MODEL).stat().st_size,
        "report": _report(path / checkpoint.REPORT),
    }


def _inspect_student(path: Path) -> dict[str, Any]:
    model, timm_name, prepared = read_saved(path)
    arch = describe(model, str(path))
    return {
        "kind": "student",
        "path": str(path),
        "model": timm_name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": to_json(arch),
        "preprocessing": preprocessing_facts(prepared),
        "bytes": (path / WEIGHTS).stat().st_size,
        "report": _report(path / REPORT),
    }


def _report(path: Path) -> Any:
    """What was measured, None where nothing readable is."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class ModelEntry:
    """A name that :func:`dfq.load_model` takes; ``kind`` is demo, alias or timm.

    ``supported``: whether :func:`dfq.quantize` takes it, or else the ``reason`` why not; None for
    names of another timm version than the one that dfq was checked with.
    """

    name: str
    kind: str
    pretrained: bool
    supported: bool | None = True
    reason: str | None = None


@checked
def models(pattern: str | None = None) -> list[ModelEntry]:
    """The names of models: demo, aliases, and timm's vision transformers.

    ``pattern`` keeps names that contain it.  timm's names are those of its
    modules of patch transformers.

    Raises:
        UnknownModelError: no name contains the pattern.
    """
    import timm

    catalog = read_catalog()
    names = sorted({name for home in TIMM_FAMILIES for name in timm.list_models(module=home)})
    entries = [
        ModelEntry("demo", "demo", True),
        *(ModelEntry(alias, "alias", True) for alias in ALIASES),
        *(
            ModelEntry(
                name,
                "timm",
                bool(timm.is_model_pretrained(name)),
                catalog.supports(name),
                catalog.refused.get(name),
            )
            for name in names
        ),
    ]
    matching = [e for e in entries if pattern is None or pattern in e.name]
    if not matching:
        raise UnknownModelError(
            f"No model's name contains {pattern!r}.{nearest(pattern or '', names)}"
        )
    return matching


@dataclass(frozen=True)
class DoctorReport:
    """What this machine offers.

    ``problems`` is empty where all is well; ``warnings`` name what works and is slow.

    ``backend`` names the kernels that checkpoints of default settings run on, ``kernels`` those of
    every kind of layer, with the reasons against faster ones.  ``compiler`` is the C++ compiler
    that ``dfq.load(..., compiled=True)`` would use, None where there is none.
    """

    versions: dict[str, str]
    processor: str
    instructions: tuple[str, ...]
    threads: int
    devices: tuple[str, ...]
    backend: str
    kernels: tuple[KernelChoice, ...]
    compiler: str | None
    precision: str
    cache: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


@checked
def doctor(cache: str | Path | None = None) -> DoctorReport:
    """Look at versions, processor, integer kernels, cache directory and demo files."""
    cpu = torch.device("cpu")
    backend = runtime.select(cpu, needs=KernelRequirements(onednn.MAX_WEIGHT_WITHOUT_VNNI)).NAME
    root = cache_directory(cache)
    problems = []
    if not _writable(root):
        problems.append(
            f"The cache directory {root} cannot be written; use {option('cache')} or $DFQ_CACHE."
        )
    problems += [f"{p.name} is missing; reinstall dfq." for p in _missing_demo_files()]
    return DoctorReport(
        versions=versions(),
        processor=processor(),
        instructions=instructions(),
        threads=torch.get_num_threads(),
        devices=("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))),
        backend=backend,
        kernels=tuple(kernels_of_kinds(machine_devices())),
        compiler=opaque.compiler(),
        precision=resolve_precision("auto", cpu),
        cache=str(root),
        problems=tuple(problems),
        warnings=(*slow_integers(cpu), *slow_floats(cpu, training="auto")),
    )


def _missing_demo_files() -> list[Path]:
    return [p for p in (demo.WEIGHTS, demo.TEST_SLICE) if not p.is_file()]


def _writable(path: Path) -> bool:
    """Whether a directory can be made there, tried out beside it without leaving a trace."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryDirectory(dir=path):
            return True
    except OSError:
        return False
