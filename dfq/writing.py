"""Images from elsewhere as a sparse-image dataset, to calibrate on like inverted ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch

from dfq.dataset import (
    SETTINGS,
    DatasetWriter,
    SparseImageDataset,
    concatenate,
    decode_shard,
    encode_shard,
)
from dfq.errors import DamagedError, DataError, OutputError, SettingError
from dfq.recipe import Method
from dfq.sparse import Grid, SparseImages
from dfq.synthesis import dataset_facts
from dfq.vit.load import LoadedModel

ORIGIN = re.compile(r"[a-z][a-z0-9-]{0,31}")


def write_dataset(
    out: str | Path,
    batches: Iterable[SparseImages],
    model: LoadedModel,
    *,
    origin: str,
    settings: dict[str, Any] | None = None,
) -> SparseImageDataset:
    """Write images that dfq did not invert as a sparse-image dataset of a model.

    Calibration treats them as inverted images: what ``smooth`` and ``fractal`` of
    :class:`dfq.QuantizationSettings` say is put beside them.

    Args:
        out: the dataset's directory; it must not hold a dataset yet.
        batches: images of the model's grid, each batch with all images of its trajectories;
            it is written as a unit of work.
        model: the model that they are for, as :func:`dfq.load_model` gives it.
        origin: a word for where they come from, recorded as their method.
        settings: JSON values that are recorded beside it.

    Raises:
        DataError: there are no images, or they do not fit the model.
        OutputError: the place cannot be written or holds something else.
        SettingError: ``origin`` is no word of lower-case letters, digits and hyphens, or the
            name of one of dfq's methods.
    """
    path, methods = Path(out), get_args(Method)
    if not ORIGIN.fullmatch(origin) or origin in methods:
        raise SettingError(
            f"origin is {origin!r}; allowed: up to 32 lower-case letters, digits and hyphens, but "
            f"none of dfq's own methods ({', '.join(methods)})."
        )
    if (path / SETTINGS).exists():
        raise OutputError(f"{str(path)!r} holds a dataset already. Choose another directory.")
    facts = dataset_facts(model, {"method": origin, **(settings or {})}, torch.get_num_threads())
    grid, seen = model.vit.arch.grid, set[int]()
    writer: DatasetWriter | None = None
    units: list[dict[int, int]] = []
    for batch in batches:
        _check(batch, grid, seen)
        writer = writer or DatasetWriter(path, facts)
        writer.write(len(units), [batch])
        units.append({batch.patches.shape[1]: len(batch)})
    if writer is None:
        raise DataError("There are no images to write.")
    writer.finish(units)
    return SparseImageDataset(path)


def _check(batch: SparseImages, grid: Grid, seen: set[int]) -> None:
    """Raise DataError unless a reader will take the batch; adds its trajectories to ``seen``."""
    try:
        if batch.patches.dtype != torch.uint8 or not batch.patches.numel():
            raise DataError(
                f"patches are {batch.patches.dtype} {list(batch.patches.shape)}; they must be "
                "pixels, uint8 [images, patches, values], and at least one."
            )
        decode_shard(encode_shard(concatenate([batch])), grid, "The images")
    except DamagedError as error:
        raise DataError(f"{error} The model's grid is {grid}.") from error
    pairs = set(zip(batch.trajectory.tolist(), batch.stage.tolist(), strict=True))
    trajectories = {t for t, _ in pairs}
    if len(pairs) < len(batch) or trajectories & seen:
        raise DataError(
            "A pair of trajectory and stage occurs twice, or a trajectory in two batches; "
            "number trajectories through, and put each into one batch whole."
        )
    seen |= trajectories
