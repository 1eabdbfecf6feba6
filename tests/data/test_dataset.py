"""Sparse-image datasets on disk."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from dfq.data.dataset import (
    DatasetWriter,
    SparseImageDataset,
    concatenate,
    decode_shard,
    encode_shard,
    shard_name,
)
from dfq.data.settings import cache_key, grid_from_json, grid_to_json, read_settings
from dfq.errors import DamagedError, DatasetError, OutputError
from dfq.inversion import Engine, plan_units
from dfq.recipe import InversionSettings
from dfq.sparse import Grid, SparseImages
from dfq.vit.load import LoadedModel

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


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file with its content, every directory with None."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A finished dataset of four shards."""
    return write_dataset(tmp_path / "dataset")


# shards


@st.composite
def image_batches(draw: st.DrawFn) -> tuple[Grid, SparseImages]:
    ph, pw, c = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grid = Grid((draw(st.integers(ph, 9)), draw(st.integers(pw, 9))), (ph, pw), c)
    count, kept = draw(st.integers(1, 4)), draw(st.integers(1, grid.patches))
    stage, first = draw(st.integers(0, 5)), draw(st.integers(0, 2**31 - 10))
    return grid, make_images(grid, count, kept, stage, first)


@QUICK
@given(image_batches())
def test_shard_decodes_to_what_was_encoded(case: tuple[Grid, SparseImages]) -> None:
    grid, images = case
    assert same(decode_shard(encode_shard(images), grid, "shard"), images)


@QUICK
@given(image_batches())
def test_same_images_give_the_same_bytes(case: tuple[Grid, SparseImages]) -> None:
    grid, images = case
    content = encode_shard(images)
    assert encode_shard(images) == content
    assert encode_shard(decode_shard(content, grid, "shard")) == content


def test_shard_bytes_do_not_depend_on_memory_layout() -> None:
    images = make_images()
    strided = torch.stack([images.patches, images.patches], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert encode_shard(dataclasses.replace(images, patches=strided)) == encode_shard(images)


NUMPY_TYPES = {"I32": "<i4", "U8": "u1"}


def read_as_specified(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A shard's tensors and metadata, read from its bytes with numpy alone."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = np.frombuffer(data[start:end], NUMPY_TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata


def test_shard_holds_the_specified_tensors() -> None:
    images = make_images(kept=3)
    tensors, _ = read_as_specified(encode_shard(images))
    assert {name: (t.dtype.str, t.shape) for name, t in tensors.items()} == {
        "patches": ("|u1", (2, 3, 36)),
        "positions": ("<i4", (2, 3)),
        "labels": ("<i4", (2,)),
        "stage": ("<i4", (2,)),
        "trajectory": ("<i4", (2,)),
    }
    for name, tensor in tensors.items():
        assert np.array_equal(tensor, getattr(images, name).numpy())


def test_shard_metadata_is_the_specified_checksum() -> None:
    tensors, metadata = read_as_specified(encode_shard(make_images(kept=3)))
    hashed = b"labels[2]" + tensors["labels"].tobytes()
    hashed += b"patches[2, 3, 36]" + tensors["patches"].tobytes()
    hashed += b"positions[2, 3]" + tensors["positions"].tobytes()
    hashed += b"stage[2]" + tensors["stage"].tobytes()
    hashed += b"trajectory[2]" + tensors["trajectory"].tobytes()
    assert metadata == {"sha256": hashlib.sha256(hashed).hexdigest()}


def shard_tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """A good shard's tensors with some replaced or, with None, left out."""
    images = make_images(count=2, kept=3)
    good = {
        name: getattr(images, name).to(torch.uint8 if name == "patches" else torch.int32)
        for name in FIELDS
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not None}


def refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(DamagedError, match=r"^some name: "):
        decode_shard(save(tensors), GRID, "some name")


def test_unchanged_tensors_are_accepted() -> None:
    images = decode_shard(save(shard_tensors()), GRID, "some name")
    assert same(images, make_images(count=2, kept=3))


@pytest.mark.parametrize("name", FIELDS)
def test_shard_that_lacks_a_tensor_is_refused(name: str) -> None:
    refused(shard_tensors(**{name: None}))


def test_shard_with_another_tensor_is_refused() -> None:
    refused(shard_tensors(extra=torch.zeros(2)))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_shard_with_another_type_is_refused(name: str, dtype: torch.dtype) -> None:
    refused(shard_tensors(**{name: shard_tensors()[name].to(dtype)}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patches", (2, 3, 35)),
        ("patches", (2, 4, 36)),
        ("patches", (3, 3, 36)),
        ("patches", (2, 108)),
        ("patches", (2, 3, 3, 12)),
        ("patches", (216,)),
        ("patches", ()),
        ("positions", (2, 2)),
        ("positions", (2, 3, 1)),
        ("positions", ()),
        ("labels", (3,)),
        ("labels", (2, 1)),
        ("stage", (1,)),
        ("trajectory", ()),
    ],
)
def test_shard_with_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    dtype = shard_tensors()[name].dtype
    count = int(np.prod(shape))
    refused(shard_tensors(**{name: torch.arange(count).to(dtype).reshape(shape)}))


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 1], [5, 0, 5], [0, 1, -1], [0, 1, GRID.patches], [0, 1, 2**31 - 1], [0, 1, -(2**31)]],
)
def test_positions_that_repeat_or_leave_the_grid_are_refused(positions: list[int]) -> None:
    good = list(range(3))
    refused(shard_tensors(positions=torch.tensor([good, positions], dtype=torch.int32)))


@pytest.mark.parametrize(("name", "value"), [("labels", -2), ("stage", -1), ("trajectory", -1)])
def test_numbers_below_their_bound_are_refused(name: str, value: int) -> None:
    refused(shard_tensors(**{name: torch.tensor([0, value], dtype=torch.int32)}))


def with_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**63], [0, 2**64 - 1], [2**62, 2**62, 0]])
def test_empty_tensor_of_absurd_shape_is_refused(shape: list[int]) -> None:
    header = {
        name: {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}
        for name in FIELDS
        if name != "patches"
    }
    header["patches"] = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    with pytest.raises(DamagedError, match="some name"):
        decode_shard(with_header(header), GRID, "some name")


@QUICK
@given(st.data())
def test_damaged_shard_raises_nothing_but_damaged_error(data: st.DataObject) -> None:
    """Damage that only a checksum shows may pass, but nothing else may be raised."""
    content = bytearray(encode_shard(make_images()))
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 400))
        content[index] = data.draw(st.integers(0, 255))
    message = "shard: "
    try:
        decode_shard(bytes(content), GRID, "shard")
    except DamagedError as error:
        message = str(error)
    assert message.startswith("shard: ")


# finished datasets


def test_dataset_reads_back_bit_for_bit(dataset: Path) -> None:
    opened = SparseImageDataset(dataset)
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


def test_dataset_says_what_it_holds(dataset: Path) -> None:
    opened = SparseImageDataset(str(dataset))
    assert (len(opened), opened.method, opened.fingerprint) == (6, "pri", "f" * 64)
    assert opened.grid == GRID
    assert opened.settings == SETTINGS
    assert opened.bytes == sum(p.stat().st_size for p in dataset.iterdir())


def test_whole_dataset_verifies(dataset: Path) -> None:
    SparseImageDataset(dataset).verify()


def test_manifest_is_as_specified(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    shards = [
        {
            "name": f"shard-0000{unit}-{kept}.safetensors",
            "images": count,
            "patches": kept,
            "sha256": hashlib.sha256(
                (dataset / f"shard-0000{unit}-{kept}.safetensors").read_bytes()
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


def test_batches_hold_every_image_once_in_order(dataset: Path) -> None:
    opened = SparseImageDataset(dataset)
    found = [
        (int(t), int(s))
        for batch in opened.batches(64)
        for t, s in zip(batch.trajectory, batch.stage, strict=True)
    ]
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]


def test_batches_are_no_larger_than_asked_for(dataset: Path) -> None:
    assert [len(b) for b in SparseImageDataset(dataset).batches(1)] == [1] * 6


def test_documented_reader_gives_the_images(dataset: Path) -> None:
    """The example of docs/dataset-format.md."""
    text = (Path(__file__).parents[2] / "docs" / "dataset-format.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace('"DATASET"', repr(str(dataset)))
    example += "        found.append(image)\n"
    found: list[np.ndarray] = []
    exec(example, {"found": found})
    images = make_images(count=2, kept=2)
    expected = np.zeros((3, 8, 12), np.uint8)
    for patch, position in zip(images.patches[0], images.positions[0].tolist(), strict=True):
        y, x = position // 4 * 4, position % 4 * 3
        expected[:, y : y + 4, x : x + 3] = patch.reshape(3, 4, 3)
    assert len(found) == 6
    assert np.array_equal(found[0], expected)


@QUICK
@given(st.data())
def test_flipped_bit_anywhere_in_a_shard_is_found(dataset: Path, data: st.DataObject) -> None:
    opened = SparseImageDataset(dataset)
    path = dataset / opened.shards[1].name
    whole = path.read_bytes()
    index, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
    try:
        with pytest.raises(DamagedError, match=path.name):
            opened.verify()
    finally:
        path.write_bytes(whole)


def test_truncated_shard_is_found(dataset: Path) -> None:
    opened = SparseImageDataset(dataset)
    path = dataset / opened.shards[0].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=path.name):
        opened.verify()


def test_missing_shard_is_found(dataset: Path) -> None:
    opened = SparseImageDataset(dataset)
    (dataset / opened.shards[0].name).unlink()
    with pytest.raises(DamagedError, match=opened.shards[0].name):
        opened.verify()


def test_shard_that_is_a_directory_is_found(dataset: Path) -> None:
    opened = SparseImageDataset(dataset)
    (dataset / opened.shards[0].name).unlink()
    (dataset / opened.shards[0].name).mkdir()
    with pytest.raises(DamagedError, match=opened.shards[0].name):
        opened.verify()


@pytest.mark.parametrize("field", ["images", "patches"])
def test_manifest_that_contradicts_a_shard_is_found(dataset: Path, field: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["images"] += field == "images"
        manifest["shards"][0][field] += 1

    change_json(dataset / "manifest.json", change)
    with pytest.raises(DamagedError, match=re.escape(shard_name(0, 2))):
        SparseImageDataset(dataset).verify()


def test_shard_with_a_good_checksum_is_still_checked(dataset: Path) -> None:
    """A checksum says that a file is what was written, not that it is a shard."""
    path = dataset / shard_name(0, 2)
    tensors = shard_tensors(
        patches=torch.zeros(2, 2, 36, dtype=torch.uint8),
        positions=torch.zeros(2, 2, dtype=torch.int32),
    )
    path.write_bytes(save(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_json(dataset / "manifest.json", lambda m: m["shards"][0].update(sha256=digest))
    with pytest.raises(DamagedError, match="repeat"):
        SparseImageDataset(dataset).verify()


def test_dataset_without_a_manifest_is_unfinished(dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        SparseImageDataset(dataset)


@pytest.mark.parametrize("place", [".", "missing"])
def test_directory_that_is_no_dataset_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(DatasetError, match=r"has no settings\.json"):
        SparseImageDataset(tmp_path / place)


@pytest.mark.parametrize("file", ["settings.json", "manifest.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "cut", "array", "null", "string", "binary", "deep", "deep-value", "long-number"],
)
def test_malformed_json_is_refused_by_name(dataset: Path, file: str, content: bytes) -> None:
    (dataset / file).write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(file)):
        SparseImageDataset(dataset)


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
    dataset: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    change_json(dataset / file, lambda value: value.update(changes))
    with pytest.raises(DatasetError, match=message):
        SparseImageDataset(dataset)


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
        "shard-00000-12345678.safetensors",
        "settings.json",
        "..",
        "",
        None,
        5,
        ["shard-00000-2.safetensors"],
    ],
)
def test_shard_name_that_could_lead_elsewhere_is_refused(dataset: Path, name: Any) -> None:
    change_json(dataset / "manifest.json", lambda m: m["shards"][0].update(name=name))
    with pytest.raises(DatasetError, match="malformed field"):
        SparseImageDataset(dataset)


@pytest.mark.parametrize("field", ["images", "patches"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, [2]])
def test_shard_numbers_that_are_no_positive_integers_are_refused(
    dataset: Path, field: str, value: Any
) -> None:
    change_json(dataset / "manifest.json", lambda m: m["shards"][0].update({field: value}))
    with pytest.raises(DatasetError):
        SparseImageDataset(dataset)


def test_absurd_number_of_images_is_refused(dataset: Path) -> None:
    change_json(dataset / "manifest.json", lambda m: m["shards"][0].update(images=10**30))
    with pytest.raises(DatasetError):
        len(SparseImageDataset(dataset))


@pytest.mark.parametrize("field", ["name", "images", "patches", "sha256"])
def test_shard_without_a_field_is_refused(dataset: Path, field: str) -> None:
    change_json(dataset / "manifest.json", lambda m: m["shards"][0].pop(field))
    with pytest.raises(DatasetError):
        SparseImageDataset(dataset)


@pytest.mark.parametrize("shards", [None, 3, "text", {"a": 1}, [None], [3], ["text"], [[]]])
def test_shards_that_are_no_list_of_objects_are_refused(dataset: Path, shards: Any) -> None:
    change_json(dataset / "manifest.json", lambda m: m.update(shards=shards))
    with pytest.raises(DatasetError):
        SparseImageDataset(dataset)


def test_manifest_that_names_a_shard_twice_is_refused(dataset: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"].append(manifest["shards"][0])
        manifest["images"] += manifest["shards"][0]["images"]

    change_json(dataset / "manifest.json", change)
    with pytest.raises(DatasetError):
        SparseImageDataset(dataset)


def test_manifest_that_has_lost_a_shard_is_refused(dataset: Path) -> None:
    """Its total of images no longer fits."""
    change_json(dataset / "manifest.json", lambda m: m["shards"].pop())
    with pytest.raises(DatasetError):
        SparseImageDataset(dataset)


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
def test_malformed_grid_is_refused(dataset: Path, grid: Any) -> None:
    change_json(dataset / "settings.json", lambda s: s.update(grid=grid))
    with pytest.raises(DatasetError, match="malformed field"):
        SparseImageDataset(dataset)


@pytest.mark.parametrize("field", ["model", "inversion"])
def test_facts_that_are_no_object_are_refused(dataset: Path, field: str) -> None:
    change_json(dataset / "settings.json", lambda s: s.update({field: ["text"]}))
    with pytest.raises(DatasetError):
        _ = (SparseImageDataset(dataset).method, SparseImageDataset(dataset).fingerprint)


def test_unknown_fields_are_ignored(dataset: Path) -> None:
    change_json(dataset / "settings.json", lambda s: s.update(later={"a": 1}))
    change_json(dataset / "manifest.json", lambda m: m.update(later=None))
    SparseImageDataset(dataset).verify()


def test_files_that_the_manifest_does_not_name_are_ignored(dataset: Path) -> None:
    (dataset / "shard-00009-2.safetensors").write_bytes(b"unnamed")
    (dataset / ".shard-00009-2.safetensors.abc.tmp").write_bytes(b"left over")
    assert len(SparseImageDataset(dataset)) == 6


@QUICK
@given(image_batches())
def test_grid_survives_json(case: tuple[Grid, SparseImages]) -> None:
    grid, _ = case
    assert grid_from_json(json.loads(json.dumps(grid_to_json(grid)))) == grid


# cache keys


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
        ("preprocessing", None),
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
        ("threads", 0),
        ("threads", True),
        ("machine", ["cpu"]),
        ("versions", {"torch": 2.14}),
        ("versions", []),
    ],
    ids=str,
)
def test_a_field_of_the_settings_is_as_the_format_says(
    dataset: Path, field: str, value: Any
) -> None:
    change_json(dataset / "settings.json", lambda s: s.update({field: value}))
    with pytest.raises(DatasetError, match=rf"settings\.json': {field} is .*does not allow"):
        SparseImageDataset(dataset)


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
    tmp_path: Path, dataset: Path
) -> None:
    DatasetWriter(tmp_path / "b", SETTINGS).write(1, unit_images(1))
    writer = DatasetWriter(tmp_path / "b", SETTINGS)
    writer.write(0, unit_images(0))
    writer.finish(UNITS)
    assert tree(tmp_path / "b") == tree(dataset)


def test_finishing_removes_what_a_killed_run_left(dataset: Path) -> None:
    whole = tree(dataset)
    (dataset / "manifest.json").unlink()
    (dataset / ".shard-00000-2.safetensors.abc.tmp").write_bytes(b"half")
    DatasetWriter(dataset, SETTINGS).finish(UNITS)
    assert tree(dataset) == whole


def test_writer_begins_where_only_temporary_files_are(tmp_path: Path) -> None:
    (tmp_path / ".settings.json.abc.tmp").write_bytes(b"{")
    DatasetWriter(tmp_path, SETTINGS)
    assert read_settings(tmp_path) == SETTINGS


@QUICK
@given(st.data())
def test_writer_finds_a_flipped_bit_anywhere(dataset: Path, data: st.DataObject) -> None:
    writer = DatasetWriter(dataset, SETTINGS)
    path = dataset / shard_name(0, 3)
    whole = path.read_bytes()
    index, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
    try:
        assert not writer.has(0, UNITS[0])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_writer_finds_a_truncated_shard(dataset: Path, length: int) -> None:
    path = dataset / shard_name(0, 3)
    path.write_bytes(path.read_bytes()[:length])
    assert not DatasetWriter(dataset, SETTINGS).has(0, UNITS[0])


def test_writer_does_not_take_a_shard_of_another_size(dataset: Path) -> None:
    assert not DatasetWriter(dataset, SETTINGS).has(0, {2: 2, 3: 1})


def test_writer_does_not_take_a_shard_of_another_number_of_patches(dataset: Path) -> None:
    (dataset / shard_name(0, 2)).write_bytes((dataset / shard_name(0, 3)).read_bytes())
    assert not DatasetWriter(dataset, SETTINGS).has(0, UNITS[0])


def test_writer_says_so_where_a_shard_is_a_directory(dataset: Path) -> None:
    (dataset / shard_name(0, 3)).unlink()
    (dataset / shard_name(0, 3)).mkdir()
    writer = DatasetWriter(dataset, SETTINGS)
    with pytest.raises(OutputError):
        writer.has(0, UNITS[0])
    with pytest.raises(OutputError):
        writer.write(0, unit_images(0))


def test_writer_refuses_other_settings_and_touches_nothing(dataset: Path) -> None:
    before = tree(dataset)
    with pytest.raises(OutputError, match=r"\(model, threads differ\)"):
        DatasetWriter(dataset, {**SETTINGS, "threads": 2, "model": {}})
    assert tree(dataset) == before


def test_writer_names_settings_that_only_one_side_has(dataset: Path) -> None:
    with pytest.raises(OutputError, match=r"\(later differ\)"):
        DatasetWriter(dataset, {**SETTINGS, "later": 1})


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
def test_numbers_of_the_settings_are_finite(dataset: Path, number: str) -> None:
    text = (dataset / "settings.json").read_text()
    (dataset / "settings.json").write_text(text.replace("{", f'{{"later": {number}, ', 1))
    with pytest.raises(DatasetError, match="no finite number"):
        SparseImageDataset(dataset)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_shard(dataset: Path) -> None:
    (shard,) = dataset.glob("shard-00000-2*")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DamagedError, match="no regular file"):
        SparseImageDataset(dataset).verify()
