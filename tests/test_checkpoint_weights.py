"""Damaged weights of a checkpoint are refused by name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_json import MALFORMED
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from saved_checkpoints import change_config, quantized, save, some_images
from torch import Tensor

from dfq.checkpoint import load
from dfq.errors import CheckpointError
from dfq.quantization import QuantizedViT
from dfq.vit.load import LoadedModel, load_model

QUICK = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    state = load_tensors(file.read_bytes())
    change(state)
    file.write_bytes(save_tensors(state))
    change_config(path, lambda c: c.update(sha256=checksum(path, c)))


def checksum(path: Path, config: dict[str, Any]) -> str:
    """Return the checksum that docs/checkpoint-format.md specifies."""
    described = json.dumps([config["architecture"], config["preprocessing"]], sort_keys=True)
    content = (path / "model.safetensors").read_bytes()
    return hashlib.sha256(content + described.encode()).hexdigest()


def test_the_checksum_is_the_formats(w4a8: Path) -> None:
    config = json.loads((w4a8 / "config.json").read_text())
    assert config["sha256"] == checksum(w4a8, config)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("architecture", {"norm_eps": 100.0}),
        ("architecture", {"activation": "silu"}),
        ("architecture", {"patch_size": [2, 8]}),
        ("preprocessing", {"std": [0.9, 0.9, 0.9]}),
        ("preprocessing", {"crop_pct": 0.5}),
    ],
    ids=str,
)
def test_a_changed_description_is_damage(w4a8: Path, section: str, change: dict[str, Any]) -> None:
    change_config(w4a8, lambda c: c[section].update(change))
    with pytest.raises(CheckpointError, match=r"SHA-256 is not the one"):
        load(w4a8)


def test_rewritten_files_are_still_accepted(w4a8: Path) -> None:
    """What the tests below do to a checkpoint is no damage by itself."""
    change_config(w4a8, lambda _: None)
    change_tensors(w4a8, lambda _: None)
    load(w4a8)


@pytest.mark.parametrize("place", [".", "missing"])
def test_directory_that_is_no_checkpoint_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / place)


TENSORS = [
    "prefix",
    "pos_embed",
    "patch_embed.weight",
    "blocks.0.norm1.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.attn.qkv.weight_scale",
    "blocks.0.mlp.fc2.bias",
    "head.input_scale",
    "head.input_zero_point",
]


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensor_is_named(w4a8: Path, name: str) -> None:
    change_tensors(w4a8, lambda s: s.pop(name))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load(w4a8)


@pytest.mark.parametrize("name", ["extra", "blocks.2.norm1.weight", "head.mean"])
def test_unknown_tensor_is_named(w4a8: Path, name: str) -> None:
    change_tensors(w4a8, lambda s: s.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load(w4a8)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "reshape",
    [lambda t: t[None], lambda t: torch.stack([t, t]), lambda t: t.flatten()[:0].clone()],
    ids=["deeper", "doubled", "empty"],
)
def test_tensor_of_another_shape_is_named(
    w4a8: Path, name: str, reshape: Callable[[Tensor], Tensor]
) -> None:
    change_tensors(w4a8, lambda s: s.update({name: reshape(s[name])}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(w4a8)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int16, torch.bool])
def test_tensor_of_another_type_is_named(w4a8: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(w4a8, lambda s: s.update({name: s[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(w4a8)


def test_signed_weights_are_not_taken_for_packed_ones(w4a8: Path) -> None:
    name = "blocks.0.attn.proj.weight"
    change_tensors(w4a8, lambda s: s.update({name: s[name].view(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(w4a8)


@pytest.mark.parametrize(
    "name",
    ["prefix", "pos_embed", "norm.bias", "head.bias", "head.weight_scale", "head.input_scale"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_named(w4a8: Path, name: str, value: float) -> None:
    change_tensors(w4a8, lambda s: s[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinite"):
        load(w4a8)


@pytest.mark.parametrize(
    "name",
    ["head.weight_scale", "blocks.1.mlp.fc1.input_scale", "blocks.0.attn.product.scales"],
)
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0])
def test_scale_that_is_not_above_zero_is_named(w4a8: Path, name: str, value: float) -> None:
    change_tensors(w4a8, lambda s: s[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=f"'{name}' holds a scale"):
        load(w4a8)


@pytest.mark.parametrize("value", [-1, 256, 2**31 - 1, -(2**31)])
def test_zero_point_out_of_range_is_named(w4a8: Path, value: int) -> None:
    name = "blocks.0.attn.qkv.input_zero_point"
    change_tensors(w4a8, lambda s: s[name].fill_(value))
    with pytest.raises(CheckpointError, match=rf"'{name}' is {value}, outside 0\.\.255"):
        load(w4a8)


def test_every_byte_of_a_weight_is_a_weight(w4a8: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for name in ("head.weight", "blocks.0.attn.qkv.weight"):
            flat = state[name].view(torch.uint8).view(-1)
            flat.copy_(torch.arange(flat.numel()).to(torch.uint8))

    change_tensors(w4a8, change)
    model = load(w4a8)
    assert bool(torch.isfinite(model(some_images(model))).all())


def test_a_flipped_bit_of_a_weight_is_found(w4a8: Path) -> None:
    file = w4a8 / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        load(w4a8)


@pytest.mark.parametrize(
    ("found", "message"),
    [*((v, "a field 'sha256' of 64 digits") for v in (None, 3, "")), ("0" * 64, "is not the one")],
)
def test_weights_of_another_checksum_are_refused(w4a8: Path, found: object, message: str) -> None:
    change_config(w4a8, lambda c: c.update(sha256=found))
    with pytest.raises(CheckpointError, match=message):
        load(w4a8)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_weights_are_refused(w4a8: Path, length: int) -> None:
    file = w4a8 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(w4a8)


def test_weights_with_bytes_after_the_end_are_refused(w4a8: Path) -> None:
    file = w4a8 / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(w4a8)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_weights_whose_header_is_absurdly_long_are_refused(w4a8: Path, length: int) -> None:
    file = w4a8 / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(w4a8)


def test_missing_weights_are_refused(w4a8: Path) -> None:
    (w4a8 / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is missing"):
        load(w4a8)


def test_weights_that_are_a_directory_are_refused(w4a8: Path) -> None:
    (w4a8 / "model.safetensors").unlink()
    (w4a8 / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(w4a8)


def test_pickled_weights_are_refused_and_not_run(w4a8: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    (w4a8 / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(w4a8)
    assert not (tmp_path / "was run").exists()


@QUICK
@given(st.data())
def test_damaged_weights_raise_nothing_but_checkpoint_error(
    w4a8_saved: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Damage to a value may pass; nothing but a refusal may come of damage to the header."""
    path = tmp_path / "damaged"
    shutil.copytree(w4a8_saved, path, dirs_exist_ok=True)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, 7 + header))
        content[index] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    message = "model.safetensors"
    try:
        load(path)
    except CheckpointError as error:
        message = str(error)
    assert "model.safetensors" in message


def test_weights_of_another_checkpoint_are_refused(
    w4a8: Path, w4a8_model: QuantizedViT, loaded: LoadedModel
) -> None:
    """Names, types and shapes are the same; only the activation ranges differ."""
    other = load_model(make_vit(seed=1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    assert other.vit.arch == loaded.vit.arch
    save(w4a8.parent / "other", quantized(other, w4a8_model.settings))
    shutil.copy(w4a8.parent / "other" / "model.safetensors", w4a8)
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        load(w4a8)


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_configuration_is_refused_by_name(w4a8: Path, content: bytes) -> None:
    (w4a8 / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(w4a8)
