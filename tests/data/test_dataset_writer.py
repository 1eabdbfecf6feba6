"""Writing, resuming and cache keys of sparse-image datasets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sources import ARCH
from sparse_datasets import QUICK, SETTINGS, UNITS, change_json, make_images, same, unit_images
from trees import tree

from dfq.data.dataset import DatasetWriter, SparseImageDataset, concatenate, shard_name
from dfq.data.settings import cache_key, grid_to_json, read_settings
from dfq.errors import DamagedError, DatasetError, OutputError
from dfq.files import host_name
from dfq.inversion import Engine, plan_units
from dfq.recipe import InversionSettings
from dfq.vit.architecture import to_json
from dfq.vit.load import LoadedModel


def test_cache_key_is_as_specified() -> None:
    facts = {k: v for k, v in SETTINGS.items() if k not in ("threads", "versions")}
    text = json.dumps(facts, sort_keys=True).replace(": ", ":").replace(", ", ",")
    assert cache_key(SETTINGS) == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize("field", ["threads", "versions"])
def test_cache_key_does_not_depend_on_how_the_images_were_computed(field: str) -> None:
    assert cache_key({**SETTINGS, field: "other"}) == cache_key(SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", []),
        ("model", {"name": 3}),
        ("model", {"name": "some\x1b[31m"}),
        ("model", {"fingerprint": "f"}),
        ("model", {"architecture": None}),
        ("model", {"architecture": 5}),
        ("model", {"architecture": {}}),
        ("model", {"architecture": {**to_json(ARCH), "embed_dim": "8"}}),
        ("model", {"architecture": {**to_json(ARCH), "parsecs": 1}}),
        ("units", 5),
        ("units", "parsecs"),
        ("units", None),
        ("preprocessing", None),
        ("preprocessing", {"mean": [], "std": [0.353]}),
        ("preprocessing", {"mean": [], "std": []}),
        ("preprocessing", {"mean": [0.5]}),
        ("preprocessing", {"std": [0.5]}),
        ("preprocessing", {"mean": [0.5], "std": [None]}),
        ("preprocessing", {"mean": ["a"]}),
        ("preprocessing", {"std": [True]}),
        ("objective", "classes"),
        ("algorithm_version", 0),
        ("inversion", "pri"),
        ("inversion", {"method": 3}),
        ("inversion", {"method": "Fotos!"}),
        ("inversion", {"method": "pri", "iterations": -1}),
        ("inversion", {"method": "pri", "iterations": "many"}),
        ("inversion", {"method": "pri", "classes": [1.5]}),
        ("inversion", {"method": "dmi", "importance": "none"}),
        ("inversion", {"method": "pri", "threads": 5000}),
        ("threads", 0),
        ("threads", True),
        ("machine", ["cpu"]),
        ("versions", {"torch": 2.14}),
        ("versions", []),
    ],
    ids=str,
)
def test_a_field_of_the_settings_is_as_the_format_says(
    small_dataset: Path, field: str, value: Any
) -> None:
    change_json(small_dataset / "settings.json", lambda s: s.update({field: value}))
    with pytest.raises(DatasetError, match=rf"settings\.json': {field} is .*does not allow"):
        SparseImageDataset(small_dataset)


def test_threads_beyond_those_of_a_recipe_are_a_damaged_dataset(small_dataset: Path) -> None:
    change_json(small_dataset / "settings.json", lambda s: s.update(threads=5000))
    with pytest.raises(DatasetError, match=r"inversion is .*threads.* is 5000.*damaged"):
        SparseImageDataset(small_dataset)


def test_architecture_and_units_of_a_model_are_taken(small_dataset: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["model"]["architecture"] = to_json(ARCH)
        settings["units"] = "input range"
        settings["preprocessing"] = {"mean": [0.5], "std": [0.353]}

    change_json(small_dataset / "settings.json", change)
    opened = SparseImageDataset(small_dataset)
    assert opened.inversion == InversionSettings(images=6, threads=1)


@pytest.mark.parametrize("field", sorted(set(SETTINGS) - {"threads", "versions"}))
def test_cache_key_depends_on_what_decides_the_images(field: str) -> None:
    assert cache_key({**SETTINGS, field: "other"}) != cache_key(SETTINGS)


def test_cache_key_does_not_depend_on_the_order_of_fields() -> None:
    assert cache_key(dict(reversed(SETTINGS.items()))) == cache_key(SETTINGS)


# the writer


def test_settings_are_written_first(tmp_path: Path) -> None:
    DatasetWriter(tmp_path / "new" / "dataset", SETTINGS)
    assert list(tree(tmp_path / "new" / "dataset")) == ["settings.json"]
    assert read_settings(tmp_path / "new" / "dataset") == SETTINGS


def test_dataset_has_no_manifest_before_it_is_finished(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, SETTINGS)
    writer.write(0, unit_images(0))
    writer.write(1, unit_images(1))
    assert not (tmp_path / "manifest.json").exists()


def test_images_are_stored_by_trajectory_then_stage(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, SETTINGS)
    late, early = make_images(kept=2, stage=1), make_images(kept=2, stage=0)
    writer.write(0, [late, early])
    writer.finish([{2: 4}])
    (batch,) = SparseImageDataset(tmp_path).batches(64)
    assert batch.trajectory.tolist() == [0, 0, 1, 1]
    assert batch.stage.tolist() == [0, 1, 0, 1]
    assert torch.equal(batch.patches[1], late.patches[0])


def test_concatenation_keeps_every_image() -> None:
    parts = [make_images(stage=s, first=f) for s in (1, 0) for f in (4, 0)]
    joined = concatenate(parts)
    pairs = list(zip(joined.trajectory.tolist(), joined.stage.tolist(), strict=True))
    assert pairs == [(t, s) for t in (0, 1, 4, 5) for s in (0, 1)]
    assert torch.equal(joined.patches[5], parts[0].patches[0])


def test_writer_has_what_it_wrote(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, SETTINGS)
    writer.write(0, unit_images(0))
    assert writer.has(0, UNITS[0])
    assert not writer.has(1, UNITS[1])


def test_resumed_writer_has_what_was_written_before(tmp_path: Path) -> None:
    DatasetWriter(tmp_path, SETTINGS).write(0, unit_images(0))
    assert DatasetWriter(tmp_path, SETTINGS).has(0, UNITS[0])


def test_resumed_dataset_has_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, small_dataset: Path
) -> None:
    DatasetWriter(tmp_path / "b", SETTINGS).write(1, unit_images(1))
    writer = DatasetWriter(tmp_path / "b", SETTINGS)
    writer.write(0, unit_images(0))
    writer.finish(UNITS)
    assert tree(tmp_path / "b") == tree(small_dataset)


def unfinished(name: str) -> str:
    """Name of the temporary file that a killed process left."""
    return f".{name}.{host_name()}-{2**22 + 1}.abcdefgh.tmp"


def test_finishing_removes_what_a_killed_run_left(small_dataset: Path) -> None:
    whole = tree(small_dataset)
    (small_dataset / "manifest.json").unlink()
    (small_dataset / unfinished("shard-00000-2.safetensors")).write_bytes(b"half")
    DatasetWriter(small_dataset, SETTINGS).finish(UNITS)
    assert tree(small_dataset) == whole


def test_writer_begins_where_only_temporary_files_are(tmp_path: Path) -> None:
    (tmp_path / unfinished("settings.json")).write_bytes(b"{")
    DatasetWriter(tmp_path, SETTINGS)
    assert read_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize("name", [".notes.tmp", "notes.tmp", ".settings.json.abc.tmp"])
def test_writer_refuses_a_directory_with_temporary_files_of_others(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=re.escape(name)):
        DatasetWriter(tmp_path, SETTINGS)
    assert tree(tmp_path) == {name: b"mine"}


def test_finishing_keeps_hidden_files_and_directories_of_the_user(small_dataset: Path) -> None:
    (small_dataset / "manifest.json").unlink()
    (small_dataset / ".notes.tmp").write_text("mine")
    (small_dataset / ".cache.tmp").mkdir()
    DatasetWriter(small_dataset, SETTINGS).finish(UNITS)
    assert (small_dataset / ".notes.tmp").read_text() == "mine"
    assert (small_dataset / ".cache.tmp").is_dir()


@QUICK
@given(st.data())
def test_writer_finds_a_flipped_bit_anywhere(small_dataset: Path, data: st.DataObject) -> None:
    writer = DatasetWriter(small_dataset, SETTINGS)
    path = small_dataset / shard_name(0, 3)
    whole = path.read_bytes()
    index, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
    try:
        assert not writer.has(0, UNITS[0])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_writer_finds_a_truncated_shard(small_dataset: Path, length: int) -> None:
    path = small_dataset / shard_name(0, 3)
    path.write_bytes(path.read_bytes()[:length])
    assert not DatasetWriter(small_dataset, SETTINGS).has(0, UNITS[0])


def test_writer_does_not_take_a_shard_of_another_size(small_dataset: Path) -> None:
    assert not DatasetWriter(small_dataset, SETTINGS).has(0, {2: 2, 3: 1})


def test_writer_does_not_take_a_shard_of_another_number_of_patches(small_dataset: Path) -> None:
    (small_dataset / shard_name(0, 2)).write_bytes((small_dataset / shard_name(0, 3)).read_bytes())
    assert not DatasetWriter(small_dataset, SETTINGS).has(0, UNITS[0])


@pytest.mark.parametrize("name", [shard_name(0, 3), "manifest.json"])
def test_writer_says_so_at_once_where_a_file_is_a_directory(small_dataset: Path, name: str) -> None:
    (small_dataset / name).unlink()
    (small_dataset / name).mkdir()
    with pytest.raises(OutputError, match=re.escape(name)):
        DatasetWriter(small_dataset, SETTINGS)


def test_writer_says_so_where_a_shard_becomes_a_directory(small_dataset: Path) -> None:
    writer = DatasetWriter(small_dataset, SETTINGS)
    (small_dataset / shard_name(0, 3)).unlink()
    (small_dataset / shard_name(0, 3)).mkdir()
    with pytest.raises(OutputError):
        writer.has(0, UNITS[0])
    with pytest.raises(OutputError):
        writer.write(0, unit_images(0))


def test_writer_refuses_other_settings_and_touches_nothing(small_dataset: Path) -> None:
    before = tree(small_dataset)
    with pytest.raises(OutputError, match=r"\(model, threads differ\)"):
        DatasetWriter(small_dataset, {**SETTINGS, "threads": 2, "model": {}})
    assert tree(small_dataset) == before


def test_writer_names_settings_that_only_one_side_has(small_dataset: Path) -> None:
    with pytest.raises(OutputError, match=r"\(later differ\)"):
        DatasetWriter(small_dataset, {**SETTINGS, "later": 1})


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", ".hidden", "sub"])
def test_writer_refuses_a_foreign_directory_and_touches_nothing(tmp_path: Path, name: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if name == "sub":
        (place / name).mkdir()
    else:
        (place / name).write_bytes(b"{}")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=re.escape(name)):
        DatasetWriter(place, SETTINGS)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [b"{}", b"not json", b'{"editor.fontSize": 12}'])
def test_writer_refuses_foreign_settings_and_touches_nothing(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(OutputError):
        DatasetWriter(tmp_path, SETTINGS)
    assert tree(tmp_path) == {"settings.json": content}


def test_writer_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OutputError, match="is a file"):
        DatasetWriter(tmp_path / "file", SETTINGS)
    assert tree(tmp_path) == {"file": b"kept"}


def test_writer_refuses_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OutputError):
        DatasetWriter(tmp_path / "file" / "dataset", SETTINGS)
    assert tree(tmp_path) == {"file": b"kept"}


def test_writer_refuses_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        DatasetWriter(tmp_path / ("x" * 300), SETTINGS)


def full_disk(*_: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_writing_a_shard_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = DatasetWriter(tmp_path, SETTINGS)
    writer.write(0, unit_images(0))
    before = tree(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            writer.write(1, unit_images(1))
    assert tree(tmp_path) == before
    assert writer.has(0, UNITS[0])


def test_full_disk_while_finishing_leaves_the_dataset_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = DatasetWriter(tmp_path, SETTINGS)
    writer.write(0, unit_images(0))
    before = tree(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        writer.finish(UNITS[:1])
    assert tree(tmp_path) == before


def test_engine_images_survive_the_disk(tmp_path: Path, loaded: LoadedModel) -> None:
    chosen = InversionSettings(iterations=4, images=6, precision="float32", threads=1)
    grid = loaded.vit.arch.grid
    (unit,) = plan_units(chosen, grid.patches)
    made = Engine(loaded.vit, loaded.preprocessing, chosen).run(unit)
    writer = DatasetWriter(tmp_path, {**SETTINGS, "grid": grid_to_json(grid)})
    writer.write(0, made)
    assert writer.has(0, unit.shards)
    writer.finish([unit.shards])
    (batch,) = SparseImageDataset(tmp_path).batches(64)
    assert same(batch, concatenate(made))


def test_a_pair_of_trajectory_and_stage_occurs_once(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "x", SETTINGS)
    writer.write(0, [make_images(count=2, kept=2)])
    writer.write(1, [make_images(count=2, kept=2)])
    writer.finish([{2: 2}, {2: 2}])
    with pytest.raises(DamagedError, match=r"shard-00001-2.*repeats a pair"):
        SparseImageDataset(tmp_path / "x").verify()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_of_the_settings_are_finite(small_dataset: Path, number: str) -> None:
    text = (small_dataset / "settings.json").read_text()
    (small_dataset / "settings.json").write_text(text.replace("{", f'{{"later": {number}, ', 1))
    with pytest.raises(DatasetError, match="no finite number"):
        SparseImageDataset(small_dataset)
