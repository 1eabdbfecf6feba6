"""``dfq.write_dataset``: images from other sources as a sparse-image dataset."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dfq.arguments import checked
from dfq.data.dataset import (
    DIRECTORY,
    DatasetWriter,
    SparseImageDataset,
    decode_shard,
    encode_shard,
)
from dfq.data.settings import ORIGIN, SETTINGS, label_bound
from dfq.errors import DamagedError, DataError, OutputError, SettingError
from dfq.ownership import check_replaceable, replaced_directory
from dfq.pipeline.synthesis import dataset_facts, machine_of
from dfq.process_state import callers_state
from dfq.recipe import METHODS
from dfq.sparse import Grid, SparseImages
from dfq.vit.load import LoadedModel

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST = 2**31 - 1


@checked
def write_dataset(
    out: str | Path,
    units: Iterable[Sequence[SparseImages]],
    model: LoadedModel,
    *,
    origin: str,
    settings: dict[str, Any] | None = None,
) -> SparseImageDataset:
    """Write images that dfq did not invert as a sparse-image dataset of a model.

    Calibration treats them as inverted images and augments them by ``smooth`` and ``fractal`` of
    :class:`dfq.QuantizationSettings`.

    Args:
        out: the dataset's directory; it must not hold a dataset yet.
        units: units of work as in :meth:`dfq.SparseImageDataset.units`: images on the model's
            grid; each unit has all images of its trajectories.
        model: model of the images, from :func:`dfq.load_model`.
        origin: word for their source, recorded as their method.
        settings: further JSON values to record.

    Raises:
        DataError: there are no images, or they do not fit the model.
        OutputError: the directory cannot be written, or holds something else.
        SettingError: ``origin`` is no word of lower-case letters, digits and hyphens, or the
            name of one of dfq's methods; or ``settings`` are no JSON.
    """
    path = Path(out)
    if not ORIGIN.fullmatch(origin) or origin in METHODS:
        raise SettingError(
            f"origin is {origin!r}; allowed: up to 32 lower-case letters, digits and hyphens, but "
            f"none of dfq's own methods ({', '.join(METHODS)})."
        )
    try:
        json.dumps(settings, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(f"settings cannot be recorded as JSON: {error}.") from error
    if (path / SETTINGS).exists():
        raise OutputError(f"{str(path)!r} holds a dataset already. Choose another directory.")
    check_replaceable(path, DIRECTORY)
    facts = dataset_facts(
        model.frozen(),
        {**(settings or {}), "method": origin},
        torch.get_num_threads(),
        machine_of(torch.device("cpu")),
    )
    with replaced_directory(path, DIRECTORY) as directory:
        _write(directory, units, model.vit.arch.grid, facts)
    return SparseImageDataset(path)


def _write(
    path: Path, units: Iterable[Iterable[SparseImages]], grid: Grid, facts: dict[str, Any]
) -> None:
    seen = set[int]()
    writer: DatasetWriter | None = None
    sizes: list[dict[int, int]] = []
    for unit in _as_the_caller(units):
        _check_types(unit)
        _check(unit, grid, seen)
        _check_labels(unit, facts)
        writer = writer or DatasetWriter(path, facts)
        writer.write(len(sizes), unit)
        counts: Counter[int] = Counter()
        for batch in unit:
            counts[batch.patches.shape[1]] += len(batch)
        sizes.append(dict(sorted(counts.items())))
    if writer is None:
        raise DataError("There are no images to write.")
    writer.finish(sizes)


def _as_the_caller(units: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the caller's units, made with the caller's global settings."""
    end = object()
    with callers_state():
        rest = iter(units)
    while True:
        with callers_state():
            parts = next(rest, end)
            if parts is end:
                return
            unit = list(parts) if isinstance(parts, Iterable) else [parts]
        yield unit


def _check_types(unit: list[Any]) -> None:
    """Raise DataError unless a unit holds sparse images with whole numbers."""
    for batch in unit:
        if not isinstance(batch, SparseImages):
            raise DataError(
                f"units has {batch!r:.80}, of type {type(batch).__name__}; it takes sequences of "
                "dfq.SparseImages."
            )
        for name in ("positions", "labels", "stage", "trajectory"):
            values = getattr(batch, name)
            if not isinstance(values, torch.Tensor) or values.dtype not in INTEGERS:
                raise DataError(f"{name} is {values!r:.80}; it must be a tensor of whole numbers.")
            if values.numel() and not -LARGEST <= int(values.min()) <= int(values.max()) <= LARGEST:
                raise DataError(f"{name} has values beyond {LARGEST}, which 32 bits do not hold.")


def _check_labels(unit: list[SparseImages], facts: dict[str, Any]) -> None:
    bound = label_bound(facts)
    largest = max(int(batch.labels.max()) for batch in unit)
    if bound is not None and largest >= bound:
        raise DataError(
            f"labels has {largest}; the model's classes are 0 to {bound - 1}, and -1 is for none."
        )


def _check(unit: list[SparseImages], grid: Grid, seen: set[int]) -> None:
    """Raise DataError unless the unit can be read again; adds its trajectories to ``seen``."""
    pairs: list[tuple[int, int]] = []
    for batch in unit:
        if batch.patches.dtype != torch.uint8 or not batch.patches.numel():
            raise DataError(
                f"patches are {batch.patches.dtype} {list(batch.patches.shape)}; they must be "
                "pixels, uint8 [images, patches, values], and at least one."
            )
        try:
            decode_shard(encode_shard(batch), grid, "The images")
        except DamagedError as error:
            raise DataError(f"{error} The model's grid is {grid}.") from error
        pairs += zip(batch.trajectory.tolist(), batch.stage.tolist(), strict=True)
    trajectories = {trajectory for trajectory, _ in pairs}
    if not pairs or len(set(pairs)) < len(pairs) or trajectories & seen:
        raise DataError(
            "A unit is empty, a pair of trajectory and stage occurs twice, or a trajectory in two "
            "units; number trajectories through, and put each into one unit whole."
        )
    seen |= trajectories
