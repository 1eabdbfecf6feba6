"""Pictures of datasets."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dfq.data.dataset import DatasetWriter, shard_name
from dfq.data.preview import BACKGROUND, HEADING, MARGIN, MIN_SIDE, preview
from dfq.data.settings import grid_to_json
from dfq.errors import DamagedError, DatasetError, DfqError, OutputError, SettingError
from dfq.sparse import Grid, SparseImages, unpatchify


def settings(grid: Grid) -> dict[str, Any]:
    return {"format": "dfq-sparse-images", "format_version": 1, "grid": grid_to_json(grid)}


def write(path: Path, grid: Grid, images: SparseImages) -> Path:
    writer = DatasetWriter(path, settings(grid))
    writer.write(0, [images])
    writer.finish([{images.patches.shape[1]: len(images)}])
    return path


def write_plain(path: Path, grid: Grid, rows: list[int], kept: int = 2) -> Path:
    """A dataset with a trajectory per entry of ``rows``, which is its number of stages.

    Pixels of trajectory ``t`` at stage ``s`` are all ``100 + 10 * t + s``.
    """
    pairs = torch.tensor([(t, s) for t, stages in enumerate(rows) for s in range(stages)])
    trajectory, stage = pairs.unbind(1)
    values = (100 + 10 * trajectory + stage).to(torch.uint8)
    images = SparseImages(
        patches=values[:, None, None].repeat(1, kept, grid.patch_values),
        positions=torch.arange(kept).repeat(len(pairs), 1),
        labels=torch.zeros_like(stage),
        stage=stage,
        trajectory=trajectory,
    )
    return write(path, grid, images)


def one_image(patches: Tensor, positions: Tensor) -> SparseImages:
    """An image of patches ``[K, D]`` at positions ``[K]``."""
    zero = torch.zeros(1, dtype=torch.int64)
    return SparseImages(patches[None].to(torch.uint8), positions[None], zero, zero, zero)


GRID = Grid((8, 8), (4, 4), 3)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three trajectories of two stages; the upper two of 2x2 patches are there."""
    return write_plain(tmp_path / "dataset", GRID, [2, 2, 2])


def picture(dataset: Path, **arguments: int) -> np.ndarray:
    path = preview(dataset, dataset.parent / "preview.png", **arguments)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))[HEADING:]


def cell(sheet: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """One image of the sheet."""
    top, left = MARGIN + row * (height + MARGIN), MARGIN + column * (width + MARGIN)
    return sheet[top : top + height, left : left + width]


SIDE = MIN_SIDE  # 8 pixels, 14 times


def test_sheet_has_a_row_per_trajectory_and_a_column_per_stage(dataset: Path) -> None:
    expected = (3 * (SIDE + MARGIN) + MARGIN, 2 * (SIDE + MARGIN) + MARGIN, 3)
    assert picture(dataset).shape == expected


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(2))
def test_image_is_in_the_cell_of_its_trajectory_and_stage(
    dataset: Path, row: int, column: int
) -> None:
    drawn = cell(picture(dataset), row, column, SIDE, SIDE)
    assert bool((drawn[: SIDE // 2] == 100 + 10 * row + column).all())


def test_absent_patches_are_gray(dataset: Path) -> None:
    drawn = cell(picture(dataset), 0, 0, SIDE, SIDE)
    assert bool((drawn[SIDE // 2 :] == BACKGROUND).all())


def test_cell_without_an_image_is_darker_than_absent_patches(tmp_path: Path) -> None:
    sheet = picture(write_plain(tmp_path / "dataset", GRID, [2, 1]))
    assert bool((cell(sheet, 1, 1, SIDE, SIDE) < BACKGROUND).all())


def test_margins_are_darker_than_absent_patches(dataset: Path) -> None:
    sheet = picture(dataset)
    assert bool((sheet[:MARGIN] < BACKGROUND).all())
    assert bool((sheet[:, -MARGIN:] < BACKGROUND).all())


@pytest.mark.parametrize(("rows", "drawn"), [(1, 1), (2, 2), (3, 3), (8, 3)])
def test_rows_limit_the_trajectories(dataset: Path, rows: int, drawn: int) -> None:
    assert picture(dataset, rows=rows).shape[0] == drawn * (SIDE + MARGIN) + MARGIN


@pytest.mark.parametrize("rows", [0, -1])
def test_picture_without_rows_is_refused(dataset: Path, rows: int) -> None:
    with pytest.raises(SettingError, match="rows"):
        preview(dataset, dataset.parent / "preview.png", rows=rows)


def test_pixels_are_enlarged_in_whole_steps(tmp_path: Path) -> None:
    """60 pixels are drawn twice as large, the fewest times that reach the least side."""
    grid = Grid((30, 60), (15, 20), 3)
    sheet = picture(write_plain(tmp_path / "dataset", grid, [1]))
    assert sheet.shape == (2 * MARGIN + 60, 2 * MARGIN + 120, 3)


def test_large_images_keep_their_size(tmp_path: Path) -> None:
    grid = Grid((MIN_SIDE, MIN_SIDE + 1), (56, 113), 1)
    sheet = picture(write_plain(tmp_path / "dataset", grid, [1]))
    assert sheet.shape == (2 * MARGIN + MIN_SIDE, 2 * MARGIN + MIN_SIDE + 1, 3)


@pytest.mark.parametrize(
    ("channels", "shown"),
    [(1, (0, 0, 0)), (2, (0, 1, 0)), (3, (0, 1, 2)), (4, (0, 1, 2)), (5, (0, 1, 2))],
)
def test_any_number_of_channels_is_drawn_in_color(
    tmp_path: Path, channels: int, shown: tuple[int, int, int]
) -> None:
    grid = Grid((2, 2), (2, 2), channels)
    values = torch.arange(channels) * 10 + 60
    image = one_image(values.repeat_interleave(4)[None], torch.tensor([0]))
    path = write(tmp_path / "dataset", grid, image)
    drawn = cell(picture(path), 0, 0, MIN_SIDE, MIN_SIDE)
    assert drawn[5, 5].tolist() == [60 + 10 * c for c in shown]


def test_pixels_are_those_of_the_images(tmp_path: Path) -> None:
    """Random patches at random positions, drawn without enlargement."""
    grid = Grid((MIN_SIDE, MIN_SIDE), (28, 56), 3)
    generator = torch.Generator().manual_seed(0)
    image = one_image(
        torch.randint(0, 256, (5, grid.patch_values), generator=generator),
        torch.randperm(8, generator=generator)[:5],
    )
    path = write(tmp_path / "dataset", grid, image)
    expected = unpatchify(image.patches, image.positions, grid, fill=BACKGROUND)[0]
    drawn = cell(picture(path), 0, 0, MIN_SIDE, MIN_SIDE)
    assert np.array_equal(drawn, expected.permute(1, 2, 0).numpy())


def test_path_of_the_picture_is_returned(dataset: Path) -> None:
    out = dataset.parent / "new" / "directory" / "preview.png"
    assert preview(str(dataset), str(out)) == out
    assert out.is_file()


def test_picture_replaces_an_older_one(dataset: Path) -> None:
    out = dataset.parent / "preview.png"
    preview(dataset, out, rows=1)
    before = out.read_bytes()
    preview(dataset, out)
    assert out.read_bytes() != before
    with Image.open(out) as image:
        assert image.info == {"Software": "dfq"}


@pytest.mark.parametrize("content", ["photo", "empty", "text"])
def test_picture_of_the_user_is_not_replaced(dataset: Path, content: str) -> None:
    out = dataset.parent / "preview.png"
    if content == "photo":
        Image.new("RGB", (4, 4)).save(out)
    else:
        out.write_text("" if content == "empty" else "Software\0dfq")
    before = out.read_bytes()
    with pytest.raises(
        OutputError,
        match=r"dfq wrote, or lacks its mark.*choose another .*or remove",
    ):
        preview(dataset, out)
    assert out.read_bytes() == before


def test_link_to_an_older_picture_is_followed(dataset: Path) -> None:
    preview(dataset, dataset.parent / "target.png", rows=1)
    link = dataset.parent / "link.png"
    link.symlink_to("target.png")
    preview(dataset, link)
    assert link.is_symlink()
    assert (dataset.parent / "target.png").read_bytes() == link.read_bytes()


def test_dataset_is_left_as_it_is(dataset: Path) -> None:
    before = {p.name: p.read_bytes() for p in dataset.iterdir()}
    picture(dataset)
    assert {p.name: p.read_bytes() for p in dataset.iterdir()} == before


def test_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        preview(tmp_path, tmp_path / "preview.png")
    assert list(tmp_path.iterdir()) == []


def test_damaged_dataset_gives_no_picture(dataset: Path) -> None:
    shard = dataset / shard_name(0, 2)
    shard.write_bytes(shard.read_bytes()[:-1])
    out = dataset.parent / "preview.png"
    with pytest.raises(DamagedError, match=shard.name):
        preview(dataset, out)
    assert not out.exists()


def test_dataset_without_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    DatasetWriter(path, settings(GRID)).finish([])
    with pytest.raises(DfqError):
        preview(path, tmp_path / "preview.png")


@pytest.mark.parametrize("place", ["dataset", "file/preview.png"])
def test_place_that_cannot_be_written_is_refused(dataset: Path, place: str) -> None:
    (dataset.parent / "file").write_bytes(b"kept")
    with pytest.raises(OutputError):
        preview(dataset, dataset.parent / place)
    assert sorted(p.name for p in dataset.parent.iterdir()) == ["dataset", "file"]


def test_full_disk_leaves_no_picture(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        preview(dataset, dataset.parent / "preview.png")
    assert [p.name for p in dataset.parent.iterdir()] == ["dataset"]
