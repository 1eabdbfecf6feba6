"""Small sparse-image datasets, written by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq.data.dataset import DatasetWriter
from dfq.data.settings import grid_to_json
from dfq.sparse import Grid, SparseImages

QUICK = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


GRID = Grid((8, 12), (4, 3), 3)


SETTINGS: dict[str, Any] = {
    "format": "dfq-sparse-images",
    "format_version": 1,
    "model": {"name": "some_vit.tag", "fingerprint": "f" * 64},
    "grid": grid_to_json(GRID),
    "inversion": {"method": "pri", "images": 6},
    "threads": 1,
    "versions": {"dfq": "0"},
}


UNITS = [{2: 2, 3: 2}, {2: 1, 3: 1}]


FIELDS = [f.name for f in dataclasses.fields(SparseImages)]


def make_images(
    grid: Grid = GRID, count: int = 2, kept: int = 3, stage: int = 0, first: int = 0
) -> SparseImages:
    """Random images; trajectories count from ``first``."""
    generator = torch.Generator().manual_seed(1000 * first + 100 * stage + kept)
    shape = (count, kept, grid.patch_values)
    order = [torch.randperm(grid.patches, generator=generator)[:kept] for _ in range(count)]
    return SparseImages(
        patches=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        positions=torch.stack(order),
        labels=torch.randint(-1, 5, (count,), generator=generator),
        stage=torch.full((count,), stage),
        trajectory=torch.arange(count) + first,
    )


def unit_images(unit: int) -> list[SparseImages]:
    """The images of a unit of UNITS, two stages of each trajectory."""
    return [
        make_images(count=count, kept=kept, stage=stage, first=2 * unit)
        for stage, (kept, count) in enumerate(UNITS[unit].items())
    ]


def write_dataset(path: Path) -> Path:
    writer = DatasetWriter(path, SETTINGS)
    for unit in range(len(UNITS)):
        writer.write(unit, unit_images(unit))
    writer.finish(UNITS)
    return path


def same(a: SparseImages, b: SparseImages) -> bool:
    return all(
        torch.equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype
        for f in FIELDS
    )


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """A finished dataset of four shards."""
    return write_dataset(tmp_path / "dataset")


@st.composite
def image_batches(draw: st.DrawFn) -> tuple[Grid, SparseImages]:
    ph, pw, c = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grid = Grid((draw(st.integers(ph, 9)), draw(st.integers(pw, 9))), (ph, pw), c)
    count, kept = draw(st.integers(1, 4)), draw(st.integers(1, grid.patches))
    stage, first = draw(st.integers(0, 5)), draw(st.integers(0, 2**31 - 10))
    return grid, make_images(grid, count, kept, stage, first)


def shard_tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """A good shard's tensors with some replaced or, with None, left out."""
    images = make_images(count=2, kept=3)
    good = {
        name: getattr(images, name).to(torch.uint8 if name == "patches" else torch.int32)
        for name in FIELDS
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not None}
