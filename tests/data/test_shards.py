"""Shards of sparse images: their bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from sparse_datasets import FIELDS, GRID, QUICK, image_batches, make_images, same, shard_tensors
from torch import Tensor

from dfq.data.dataset import decode_shard, encode_shard
from dfq.errors import DamagedError
from dfq.sparse import Grid, SparseImages


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
