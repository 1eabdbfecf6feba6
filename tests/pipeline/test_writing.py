"""``dfq.write_dataset``, and the settings that datasets record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq import InversionSettings, LoadedModel, SparseImageDataset, SparseImages
from dfq.errors import DataError, OutputError, SettingError
from dfq.pipeline.calibration_set import augmented
from dfq.pipeline.synthesis import _dataset_settings

CPU = torch.device("cpu")


def images(loaded: LoadedModel, count: int = 5) -> SparseImages:
    return dfq.fractal_noise(count, loaded.vit.arch.grid, 7)


def test_what_is_written_is_read(tmp_path: Path, loaded: LoadedModel) -> None:
    given = images(loaded)
    units = [[given[:3]], [given[3:]]]
    dataset = dfq.write_dataset(
        tmp_path / "set", units, loaded, origin="fractal", settings={"first": 7}
    )
    again = SparseImageDataset(tmp_path / "set")
    assert len(dataset) == len(again) == 5
    assert again.method == "fractal"
    assert again.fingerprint == loaded.fingerprint
    assert again.settings["inversion"] == {"method": "fractal", "first": 7}
    read = [image for unit in again.units() for image in unit]
    assert torch.equal(torch.cat([r.patches for r in read]), given.patches)
    again.verify()


def test_units_of_several_sizes_are_written_as_they_are_read(
    tmp_path: Path, tiny: VisionTransformer, loaded: LoadedModel
) -> None:
    settings = {"stages": 3, "iterations": 3, "unit_size": 2, "threads": 1}
    dfq.invert(tiny, images=12, settings=settings, out=tmp_path / "inverted")
    source = SparseImageDataset(tmp_path / "inverted")
    copy = dfq.write_dataset(tmp_path / "copy", source.units(), loaded, origin="copy")
    assert copy.shards == source.shards
    assert len({shard.patches for shard in copy.shards}) == 2


@pytest.mark.parametrize("smooth", [(), (4.0,)], ids=["alone", "augmented"])
def test_a_model_is_calibrated_on_them(tmp_path: Path, loaded: LoadedModel, smooth: Any) -> None:

    written = dfq.write_dataset(tmp_path / "set", [[images(loaded)]], loaded, origin="real")
    settings = dfq.QuantizationSettings(smooth=smooth, fractal=0)
    assert len(augmented(written, settings)) == 5 + 5 * len(smooth)


def wrong(loaded: LoadedModel) -> dict[str, list[list[SparseImages]]]:
    good = images(loaded)
    classes = loaded.vit.arch.num_classes
    twice = torch.zeros_like(good.positions)
    return {
        "nothing": [],
        "an empty unit": [[]],
        "a trajectory in two units": [[good], [good]],
        "an image twice": [[good, good]],
        "a stage twice": [
            [dataclasses.replace(good, trajectory=torch.zeros(5, dtype=torch.int64))]
        ],
        "another grid": [[dataclasses.replace(good, patches=good.patches[..., :9])]],
        "a position twice": [[dataclasses.replace(good, positions=twice)]],
        "no pixels": [[dataclasses.replace(good, patches=good.patches.float())]],
        "an impossible label": [[dataclasses.replace(good, labels=good.labels - 1)]],
        "a class too many": [[dataclasses.replace(good, labels=good.labels * 0 + classes)]],
    }


@pytest.mark.parametrize(
    "what",
    [
        "nothing",
        "an empty unit",
        "a trajectory in two units",
        "an image twice",
        "a stage twice",
        "another grid",
        "a position twice",
        "no pixels",
        "an impossible label",
        "a class too many",
    ],
)
def test_images_that_no_reader_takes_are_refused(
    tmp_path: Path, loaded: LoadedModel, what: str
) -> None:
    with pytest.raises(DataError):
        dfq.write_dataset(tmp_path / "set", wrong(loaded)[what], loaded, origin="real")
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize("origin", ["", "pri", "noise", "Real", "a b", "../x"])
def test_an_origin_is_a_word_of_its_own(tmp_path: Path, loaded: LoadedModel, origin: str) -> None:
    with pytest.raises(SettingError, match="origin"):
        dfq.write_dataset(tmp_path / "set", [[images(loaded)]], loaded, origin=origin)
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_not_overwritten(tmp_path: Path, loaded: LoadedModel) -> None:
    dfq.write_dataset(tmp_path / "set", [[images(loaded)]], loaded, origin="real")
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="already"):
        dfq.write_dataset(tmp_path / "set", [[images(loaded, 2)]], loaded, origin="real")
    assert (tmp_path / "set" / "manifest.json").read_bytes() == before


LATER = {"leave_first": "least", "leave_at": (0.1, 0.2, 0.3), "snapshots": 3}


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        ("pri", {"leave_first", "leave_at"}),
        ("smi", set()),
        ("dmi", {"snapshots"}),
        ("noise", set()),
    ],
)
def test_newer_settings_are_recorded_where_they_change_images(
    loaded: LoadedModel, method: Any, counts: set[str]
) -> None:
    plain = _dataset_settings(loaded, InversionSettings(method=method, threads=1), CPU)["inversion"]
    assert not set(LATER) & set(plain)
    changed = InversionSettings(method=method, threads=1, **LATER)  # type: ignore[arg-type]
    recorded = _dataset_settings(loaded, changed, CPU)["inversion"]
    assert set(recorded) - set(plain) == counts


def test_a_bad_unit_leaves_nothing(tmp_path: Path, loaded: LoadedModel) -> None:
    given = images(loaded)
    with pytest.raises(DataError):
        dfq.write_dataset(tmp_path / "set", [[given[:3]], [given[:3]]], loaded, origin="fractal")
    assert not list(tmp_path.iterdir())
    dfq.write_dataset(tmp_path / "set", [[given]], loaded, origin="fractal")


def test_other_things_than_sparse_images_are_refused(tmp_path: Path, loaded: LoadedModel) -> None:
    nothing: Any = None
    good = images(loaded)
    odd: list[Any] = [
        [5],
        [[5]],
        [[dataclasses.replace(good, labels=nothing)]],
        [[dataclasses.replace(good, labels=good.labels + 0.5)]],
        [[dataclasses.replace(good, trajectory=good.trajectory + 2**32)]],
    ]
    for units in odd:
        with pytest.raises(DataError, match=r"it takes|must be|32 bits"):
            dfq.write_dataset(tmp_path / "x", units, loaded, origin="photos")
    with pytest.raises(SettingError, match="cannot be recorded as JSON"):
        dfq.write_dataset(
            tmp_path / "x", [[good]], loaded, origin="photos", settings={"a": float("nan")}
        )
    assert not (tmp_path / "x").exists()
