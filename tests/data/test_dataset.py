"""Reading of sparse-image datasets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sources import ARCH
from malformed_json import MALFORMED
from safetensors.torch import save
from sparse_datasets import (
    GRID,
    QUICK,
    SETTINGS,
    UNITS,
    change_json,
    image_batches,
    make_images,
    same,
    shard_tensors,
    unit_images,
    write_dataset,
)
from trees import tree

from dfq.data.dataset import SparseImageDataset, encode_shard, shard_name
from dfq.data.settings import grid_from_json, grid_to_json
from dfq.errors import DamagedError, DatasetError
from dfq.sparse import Grid, SparseImages
from dfq.vit.architecture import to_json


def test_dataset_reads_back_bit_for_bit(small_dataset: Path) -> None:
    opened = SparseImageDataset(small_dataset)
    written = {
        shard_name(unit, images.patches.shape[1]): images
        for unit in range(len(UNITS))
        for images in unit_images(unit)
    }
    assert [s.name for s in opened.shards] == list(written)
    for shard in opened.shards:
        assert same(opened.read(shard), written[shard.name])


def test_dataset_made_twice_has_the_same_bytes(tmp_path: Path) -> None:
    assert tree(write_dataset(tmp_path / "a")) == tree(write_dataset(tmp_path / "b"))


def test_dataset_says_what_it_holds(small_dataset: Path) -> None:
    opened = SparseImageDataset(str(small_dataset))
    assert (len(opened), opened.method, opened.fingerprint) == (6, "pri", "f" * 64)
    assert opened.grid == GRID
    assert opened.settings == SETTINGS
    assert opened.bytes == sum(p.stat().st_size for p in small_dataset.iterdir())


def test_whole_dataset_verifies(small_dataset: Path) -> None:
    SparseImageDataset(small_dataset).verify()


def test_manifest_is_as_specified(small_dataset: Path) -> None:
    manifest = json.loads((small_dataset / "manifest.json").read_text())
    shards = [
        {
            "name": f"shard-0000{unit}-{kept}.safetensors",
            "images": count,
            "patches": kept,
            "sha256": hashlib.sha256(
                (small_dataset / f"shard-0000{unit}-{kept}.safetensors").read_bytes()
            ).hexdigest(),
        }
        for unit, sizes in enumerate(UNITS)
        for kept, count in sizes.items()
    ]
    assert manifest == {
        "format": "dfq-sparse-images",
        "format_version": 1,
        "images": 6,
        "shards": shards,
    }


def test_batches_hold_every_image_once_in_order(small_dataset: Path) -> None:
    opened = SparseImageDataset(small_dataset)
    ids = [
        (int(t), int(s))
        for batch in opened.batches(64)
        for t, s in zip(batch.trajectory, batch.stage, strict=True)
    ]
    assert ids == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]


def test_batches_are_no_larger_than_asked_for(small_dataset: Path) -> None:
    assert [len(b) for b in SparseImageDataset(small_dataset).batches(1)] == [1] * 6


def test_documented_reader_gives_the_images(small_dataset: Path) -> None:
    """The example of docs/dataset-format.md."""
    text = (Path(__file__).parents[2] / "docs" / "dataset-format.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace('"DATASET"', repr(str(small_dataset)))
    example += "        found.append(image)\n"
    actual: list[np.ndarray] = []
    exec(example, {"found": actual})
    images = make_images(count=2, kept=2)
    expected = np.zeros((3, 8, 12), np.uint8)
    for patch, position in zip(images.patches[0], images.positions[0].tolist(), strict=True):
        y, x = position // 4 * 4, position % 4 * 3
        expected[:, y : y + 4, x : x + 3] = patch.reshape(3, 4, 3)
    assert len(actual) == 6
    assert np.array_equal(actual[0], expected)


@QUICK
@given(st.data())
def test_flipped_bit_anywhere_in_a_shard_is_found(small_dataset: Path, data: st.DataObject) -> None:
    opened = SparseImageDataset(small_dataset)
    path = small_dataset / opened.shards[1].name
    whole = path.read_bytes()
    index, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
    try:
        with pytest.raises(DamagedError, match=path.name):
            opened.verify()
    finally:
        path.write_bytes(whole)


def test_truncated_shard_is_found(small_dataset: Path) -> None:
    opened = SparseImageDataset(small_dataset)
    path = small_dataset / opened.shards[0].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=path.name):
        opened.verify()


def test_missing_shard_is_found(small_dataset: Path) -> None:
    opened = SparseImageDataset(small_dataset)
    (small_dataset / opened.shards[0].name).unlink()
    with pytest.raises(DamagedError, match=opened.shards[0].name):
        opened.verify()


def test_shard_that_is_a_directory_is_found(small_dataset: Path) -> None:
    opened = SparseImageDataset(small_dataset)
    (small_dataset / opened.shards[0].name).unlink()
    (small_dataset / opened.shards[0].name).mkdir()
    with pytest.raises(DamagedError, match=opened.shards[0].name):
        opened.verify()


@pytest.mark.parametrize("field", ["images", "patches"])
def test_manifest_that_contradicts_a_shard_is_found(small_dataset: Path, field: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["images"] += field == "images"
        manifest["shards"][0][field] += 1

    change_json(small_dataset / "manifest.json", change)
    with pytest.raises(DatasetError, match=re.escape(shard_name(0, 2))):
        SparseImageDataset(small_dataset).verify()


def put(dataset: Path, unit: int, images: SparseImages) -> None:
    """Replace a shard, with its entry of the manifest, by one of these images as they are."""
    content = encode_shard(images)
    name = shard_name(unit, images.patches.shape[1])
    (dataset / name).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        (entry,) = [s for s in manifest["shards"] if s["name"] == name]
        manifest["images"] += len(images) - entry["images"]
        entry.update(images=len(images), sha256=hashlib.sha256(content).hexdigest())

    change_json(dataset / "manifest.json", change)


ITERATIONS: dict[str, Callable[[SparseImageDataset], object]] = {
    "verify": SparseImageDataset.verify,
    "batches": lambda dataset: list(dataset.batches(64)),
    "units": lambda dataset: list(dataset.units()),
}


@pytest.mark.parametrize("iterate", ITERATIONS.values(), ids=ITERATIONS)
def test_images_occur_once_and_in_order(
    small_dataset: Path, iterate: Callable[[SparseImageDataset], object]
) -> None:
    opened = SparseImageDataset(small_dataset)
    first, second = opened.read(opened.shards[2]), opened.read(opened.shards[0])
    for images, message in (
        (dataclasses.replace(first, trajectory=first.trajectory * 0), "00001-2.*repeats a pair"),
        (second[torch.tensor([0, 0])], "00001-2.*repeats a pair"),
        (dataclasses.replace(second, trajectory=torch.tensor([9, 8])), "00001-2.*not in order"),
    ):
        put(small_dataset, 1, images)
        with pytest.raises(DamagedError, match=message):
            iterate(SparseImageDataset(small_dataset))


@pytest.mark.parametrize(
    ("objective", "classes", "bound"),
    [("class", 10, 10), ("binary", 1, 2), ("direction", 0, None), (None, 10, None)],
)
def test_labels_are_classes_of_the_model(
    small_dataset: Path, objective: str | None, classes: int, bound: int | None
) -> None:
    def change(settings: dict[str, Any]) -> None:
        architecture = to_json(dataclasses.replace(ARCH, num_classes=classes))
        settings["model"]["architecture"] = architecture
        settings.update({} if objective is None else {"objective": objective})

    change_json(small_dataset / "settings.json", change)
    opened = SparseImageDataset(small_dataset)
    images = opened.read(opened.shards[0]) if bound is None else unit_images(0)[0]
    for label in (-1, (bound or 1_000_001) - 1):
        put(small_dataset, 0, dataclasses.replace(images, labels=torch.full((2,), label)))
        opened = SparseImageDataset(small_dataset)
        assert opened.read(opened.shards[0]).labels.tolist() == [label] * 2
    if bound is not None:
        put(small_dataset, 0, dataclasses.replace(images, labels=torch.tensor([0, bound])))
        with pytest.raises(DamagedError, match=f"a label of {bound}; .* 0 to {bound - 1}"):
            list(SparseImageDataset(small_dataset).batches(64))


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 2, 1, 3), (2, 3, 0, 1)], ids=str)
def test_shards_are_in_the_order_of_units_and_sizes(
    small_dataset: Path, order: tuple[int, ...]
) -> None:
    def reorder(manifest: dict[str, Any]) -> None:
        manifest["shards"] = [manifest["shards"][i] for i in order]

    change_json(small_dataset / "manifest.json", reorder)
    with pytest.raises(DatasetError, match="not in order"):
        SparseImageDataset(small_dataset)


def test_shard_with_a_good_checksum_is_still_checked(small_dataset: Path) -> None:
    """A checksum says that a file is what was written, not that it is a shard."""
    path = small_dataset / shard_name(0, 2)
    tensors = shard_tensors(
        patches=torch.zeros(2, 2, 36, dtype=torch.uint8),
        positions=torch.zeros(2, 2, dtype=torch.int32),
    )
    path.write_bytes(save(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_json(small_dataset / "manifest.json", lambda m: m["shards"][0].update(sha256=digest))
    with pytest.raises(DamagedError, match="repeat"):
        SparseImageDataset(small_dataset).verify()


def test_dataset_without_a_manifest_is_unfinished(small_dataset: Path) -> None:
    (small_dataset / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize("place", [".", "missing"])
def test_directory_that_is_no_dataset_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(DatasetError, match=r"has no settings\.json"):
        SparseImageDataset(tmp_path / place)


@pytest.mark.parametrize("file", ["settings.json", "manifest.json"])
@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_json_is_refused_by_name(small_dataset: Path, file: str, content: bytes) -> None:
    (small_dataset / file).write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(file)):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize("file", ["settings.json", "manifest.json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "not of format"),
        ({"format": None}, "not of format"),
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": None}, "format version None"),
    ],
)
def test_other_formats_and_versions_are_refused(
    small_dataset: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    change_json(small_dataset / file, lambda value: value.update(changes))
    with pytest.raises(DatasetError, match=message):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize(
    "name",
    [
        "../shard-00000-2.safetensors",
        "/shard-00000-2.safetensors",
        "sub/shard-00000-2.safetensors",
        "..\\shard-00000-2.safetensors",
        "shard-00000-2.safetensors\n",
        "shard-00000-2.safetensors/../settings.json",
        "shard-0000-2.safetensors",
        "shard-000000-2.safetensors",
        "shard-00000-02.safetensors",
        "shard-00000-3.safetensors",
        "shard-00000-12345678.safetensors",
        "settings.json",
        "..",
        "",
        None,
        5,
        ["shard-00000-2.safetensors"],
    ],
)
def test_shard_name_that_could_lead_elsewhere_is_refused(small_dataset: Path, name: Any) -> None:
    change_json(small_dataset / "manifest.json", lambda m: m["shards"][0].update(name=name))
    with pytest.raises(DatasetError, match="malformed field"):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize("field", ["images", "patches"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, [2]])
def test_shard_numbers_that_are_no_positive_integers_are_refused(
    small_dataset: Path, field: str, value: Any
) -> None:
    change_json(small_dataset / "manifest.json", lambda m: m["shards"][0].update({field: value}))
    with pytest.raises(DatasetError):
        SparseImageDataset(small_dataset)


def test_absurd_number_of_images_is_refused(small_dataset: Path) -> None:
    change_json(small_dataset / "manifest.json", lambda m: m["shards"][0].update(images=10**30))
    with pytest.raises(DatasetError):
        len(SparseImageDataset(small_dataset))


@pytest.mark.parametrize("field", ["name", "images", "patches", "sha256"])
def test_shard_without_a_field_is_refused(small_dataset: Path, field: str) -> None:
    change_json(small_dataset / "manifest.json", lambda m: m["shards"][0].pop(field))
    with pytest.raises(DatasetError):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize("shards", [None, 3, "text", {"a": 1}, [None], [3], ["text"], [[]]])
def test_shards_that_are_no_list_of_objects_are_refused(small_dataset: Path, shards: Any) -> None:
    change_json(small_dataset / "manifest.json", lambda m: m.update(shards=shards))
    with pytest.raises(DatasetError):
        SparseImageDataset(small_dataset)


def test_manifest_that_names_a_shard_twice_is_refused(small_dataset: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"].append(manifest["shards"][0])
        manifest["images"] += manifest["shards"][0]["images"]

    change_json(small_dataset / "manifest.json", change)
    with pytest.raises(DatasetError):
        SparseImageDataset(small_dataset)


def test_manifest_that_has_lost_a_shard_is_refused(small_dataset: Path) -> None:
    """Its total of images no longer fits."""
    change_json(small_dataset / "manifest.json", lambda m: m["shards"].pop())
    with pytest.raises(DatasetError):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize(
    "grid",
    [
        None,
        [],
        {},
        {**grid_to_json(GRID), "channels": 0},
        {**grid_to_json(GRID), "channels": True},
        {**grid_to_json(GRID), "channels": 3.0},
        {**grid_to_json(GRID), "channels": 1 << 20},
        {**grid_to_json(GRID), "image_size": [8]},
        {**grid_to_json(GRID), "image_size": 8},
        {**grid_to_json(GRID), "image_size": [8, -12]},
        {**grid_to_json(GRID), "patch_size": [9, 3]},
        {**grid_to_json(GRID), "patch_size": [4, 13]},
        {**grid_to_json(GRID), "patch_size": ["4", "3"]},
    ],
)
def test_malformed_grid_is_refused(small_dataset: Path, grid: Any) -> None:
    change_json(small_dataset / "settings.json", lambda s: s.update(grid=grid))
    with pytest.raises(DatasetError, match="malformed field"):
        SparseImageDataset(small_dataset)


@pytest.mark.parametrize("field", ["model", "inversion"])
def test_facts_that_are_no_object_are_refused(small_dataset: Path, field: str) -> None:
    change_json(small_dataset / "settings.json", lambda s: s.update({field: ["text"]}))
    with pytest.raises(DatasetError):
        _ = (
            SparseImageDataset(small_dataset).method,
            SparseImageDataset(small_dataset).fingerprint,
        )


def test_unknown_fields_are_ignored(small_dataset: Path) -> None:
    change_json(small_dataset / "settings.json", lambda s: s.update(later={"a": 1}))
    change_json(small_dataset / "manifest.json", lambda m: m.update(later=None))
    SparseImageDataset(small_dataset).verify()


def test_files_that_the_manifest_does_not_name_are_ignored(small_dataset: Path) -> None:
    (small_dataset / "shard-00009-2.safetensors").write_bytes(b"unnamed")
    (small_dataset / ".shard-00009-2.safetensors.abc.tmp").write_bytes(b"left over")
    assert len(SparseImageDataset(small_dataset)) == 6


@QUICK
@given(image_batches())
def test_grid_survives_json(case: tuple[Grid, SparseImages]) -> None:
    grid, _ = case
    assert grid_from_json(json.loads(json.dumps(grid_to_json(grid)))) == grid


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_shard(small_dataset: Path) -> None:
    (shard,) = small_dataset.glob("shard-00000-2*")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DamagedError, match="no regular file"):
        SparseImageDataset(small_dataset).verify()
