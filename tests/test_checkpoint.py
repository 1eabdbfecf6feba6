"""Checkpoints: what is written, what is refused, and that nothing is lost in between."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from documented_reader import F32, DocumentedReader
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_numpy
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from timm.layers import QuickGELU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.checkpoint import check_output, load, read_info, save_checkpoint, write_report
from dfq.errors import CheckpointError, OutputError
from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.scheme import Scheme
from dfq.recipe import InversionSettings, QuantizationSettings, Recipe, load_recipe
from dfq.vit import Architecture
from dfq.vit.load import LoadedModel, load_model

QUICK = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

INVERSION = InversionSettings(iterations=4, images=8, precision="float32", threads=1)

SOURCE = {"timm_name": "some_vit", "fingerprint": "f" * 64}

LIMIT = 2**20 - 1


def quantized(loaded: LoadedModel, settings: QuantizationSettings) -> QuantizedViT:
    engine = Engine(loaded.vit, loaded.preprocessing, INVERSION)
    units = plan_units(INVERSION, loaded.vit.arch.grid.patches)
    images = [batch for unit in units for batch in engine.run(unit)]
    found = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, found, loaded.preprocessing, settings)


def save(path: Path, model: QuantizedViT) -> int:
    return save_checkpoint(
        path,
        model,
        name="my vit",
        recipe=Recipe(INVERSION, model.settings),
        source=SOURCE,
    )


def some_images(model: QuantizedViT, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, model.arch.in_channels, *model.arch.image_size)
    return torch.randn(shape, generator=generator)


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file with its content, every directory with None."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }


@pytest.fixture(scope="module")
def model() -> QuantizedViT:
    """The small model with 4-bit weights and 8-bit attention, which has tensors of all kinds."""
    loaded = load_model(make_vit(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return quantized(loaded, QuantizationSettings(bits=4, attention="int8"))


@pytest.fixture(scope="module")
def saved(model: QuantizedViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint, which no test changes."""
    path = tmp_path_factory.mktemp("checkpoints") / "saved"
    save(path, model)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, alone in its parent directory."""
    return Path(shutil.copytree(saved, tmp_path / "place" / "checkpoint"))


# round trips


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("attention", ["float", "int8"])
def test_loaded_model_gives_the_same_logits(
    tmp_path: Path, loaded: LoadedModel, bits: Any, attention: Any
) -> None:
    model = quantized(loaded, QuantizationSettings(bits=bits, attention=attention))
    save(tmp_path / "out", model)
    images = some_images(model)
    assert torch.equal(load(tmp_path / "out")(images), model(images))


VARIANTS: dict[str, dict[str, Any]] = {
    "average": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2, "global_pool": "avg"},
    "normed": {"qk_norm": True, "pre_norm": True},
    "odd": {"embed_dim": 33, "num_heads": 3, "reg_tokens": 1},
    "quick": {"act_layer": QuickGELU},
    "tanh": {"act_layer": "gelu_tanh"},
    "rectangles": {"img_size": (18, 13), "patch_size": (4, 3)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_survives_the_disk(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = quantized(load_model(make_vit(**changes)), QuantizationSettings(bits=4))
    save(tmp_path / "out", model)
    images = some_images(model)
    assert torch.equal(load(tmp_path / "out")(images), model(images))


def test_state_survives_the_disk(checkpoint: Path, model: QuantizedViT) -> None:
    ours, theirs = load(checkpoint).state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_loaded_model_knows_how_it_was_made(checkpoint: Path, model: QuantizedViT) -> None:
    found = load(str(checkpoint))
    assert found.arch == model.arch
    assert found.preprocessing == model.preprocessing
    assert found.settings == model.settings


def test_loaded_model_is_for_inference(checkpoint: Path) -> None:
    found = load(checkpoint)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_info_is_what_was_saved(checkpoint: Path, model: QuantizedViT) -> None:
    info = read_info(str(checkpoint))
    assert (info.model, info.source) == ("my vit", SOURCE)
    assert (info.arch, info.preprocessing) == (model.arch, model.preprocessing)
    assert info.recipe == Recipe(INVERSION, model.settings)


def test_checkpoint_has_the_specified_files(checkpoint: Path) -> None:
    names = {"config.json", "model.safetensors", "recipe.toml"}
    assert {p.name for p in checkpoint.iterdir()} == names


def test_recipe_file_is_the_recipe(checkpoint: Path, model: QuantizedViT) -> None:
    assert load_recipe(checkpoint / "recipe.toml") == Recipe(INVERSION, model.settings)


def test_the_size_of_the_weights_is_returned(tmp_path: Path, model: QuantizedViT) -> None:
    size = save(tmp_path / "out", model)
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_report_is_no_part_of_the_model(checkpoint: Path, model: QuantizedViT) -> None:
    write_report(checkpoint, {"agreement": 1.0})
    assert json.loads((checkpoint / "report.json").read_text()) == {"agreement": 1.0}
    images = some_images(model)
    assert torch.equal(load(checkpoint)(images), model(images))


def test_same_model_gives_the_same_bytes(checkpoint: Path, model: QuantizedViT) -> None:
    save(checkpoint.parent / "again", model)
    assert tree(checkpoint.parent / "again") == tree(checkpoint)


def test_files_that_were_put_beside_are_ignored(checkpoint: Path, model: QuantizedViT) -> None:
    (checkpoint / "notes.txt").write_text("note")
    (checkpoint / "recipe.toml").write_text("not = a recipe")
    images = some_images(model)
    assert torch.equal(load(checkpoint)(images), model(images))


def test_fields_that_later_versions_add_to_the_configuration_are_ignored(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c.update(later={"a": 1}))
    load(checkpoint)


# the loaded module


def test_copy_of_a_used_model_gives_the_same_logits(checkpoint: Path) -> None:
    model = load(checkpoint)
    images = some_images(model)
    before = model(images)
    assert torch.equal(copy.deepcopy(model)(images), before)


def test_pickled_model_gives_the_same_logits(checkpoint: Path) -> None:
    model = load(checkpoint)
    images = some_images(model)
    before = model(images)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), before)


def test_pickle_of_a_used_model_is_no_larger(checkpoint: Path) -> None:
    """The kernels' own copies of the weights stay out of it."""
    model = load(checkpoint)
    fresh = len(pickle.dumps(model))
    model(some_images(model))
    assert len(pickle.dumps(model)) == fresh


def test_state_dict_of_a_used_model_has_the_same_tensors(checkpoint: Path) -> None:
    model = load(checkpoint)
    fresh = list(model.state_dict())
    model(some_images(model))
    assert list(model.state_dict()) == fresh


def test_state_dict_survives_torch_save(checkpoint: Path) -> None:
    model = load(checkpoint)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_loading_a_state_dict_changes_what_a_used_model_computes(checkpoint: Path) -> None:
    model = load(checkpoint)
    images = some_images(model)
    before = model(images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["head.weight"].neg_()
    state["head.bias"].neg_()
    model.load_state_dict(state)
    assert torch.equal(model(images), -before)


def test_loaded_model_does_not_depend_on_its_files(checkpoint: Path) -> None:
    model = load(checkpoint)
    images = some_images(model)
    before = model(images)
    file = checkpoint / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert torch.equal(copy.deepcopy(model)(images), before)


def test_copy_does_not_share_weights(checkpoint: Path) -> None:
    model = load(checkpoint)
    duplicate = copy.deepcopy(model)
    assert isinstance(duplicate.head.bias, Tensor)
    duplicate.head.bias.add_(1)
    images = some_images(model)
    torch.testing.assert_close(duplicate(images), model(images) + 1)


# damage


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    state = load_tensors(file.read_bytes())
    change(state)
    file.write_bytes(save_tensors(state))
    change_config(path, lambda c: c.update(sha256=checksum(path, c)))


def checksum(path: Path, config: dict[str, Any]) -> str:
    """As docs/checkpoint-format.md has it."""
    described = json.dumps([config["architecture"], config["preprocessing"]], sort_keys=True)
    content = (path / "model.safetensors").read_bytes()
    return hashlib.sha256(content + described.encode()).hexdigest()


def test_the_checksum_is_the_formats(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["sha256"] == checksum(checkpoint, config)


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
def test_a_changed_description_is_damage(
    checkpoint: Path, section: str, change: dict[str, Any]
) -> None:
    change_config(checkpoint, lambda c: c[section].update(change))
    with pytest.raises(CheckpointError, match=r"SHA-256 is not the one"):
        load(checkpoint)


def test_rewritten_files_are_still_accepted(checkpoint: Path) -> None:
    """What the tests below do to a checkpoint is no damage by itself."""
    change_config(checkpoint, lambda _: None)
    change_tensors(checkpoint, lambda _: None)
    load(checkpoint)


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
def test_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    change_tensors(checkpoint, lambda s: s.pop(name))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["extra", "blocks.2.norm1.weight", "head.mean"])
def test_unknown_tensor_is_named(checkpoint: Path, name: str) -> None:
    change_tensors(checkpoint, lambda s: s.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load(checkpoint)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "reshape",
    [lambda t: t[None], lambda t: torch.stack([t, t]), lambda t: t.flatten()[:0].clone()],
    ids=["deeper", "doubled", "empty"],
)
def test_tensor_of_another_shape_is_named(
    checkpoint: Path, name: str, reshape: Callable[[Tensor], Tensor]
) -> None:
    change_tensors(checkpoint, lambda s: s.update({name: reshape(s[name])}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(checkpoint)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int16, torch.bool])
def test_tensor_of_another_type_is_named(checkpoint: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(checkpoint, lambda s: s.update({name: s[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(checkpoint)


def test_signed_weights_are_not_taken_for_packed_ones(checkpoint: Path) -> None:
    name = "blocks.0.attn.proj.weight"
    change_tensors(checkpoint, lambda s: s.update({name: s[name].view(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"'{name}' is"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["prefix", "pos_embed", "norm.bias", "head.bias", "head.weight_scale", "head.input_scale"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_named(checkpoint: Path, name: str, value: float) -> None:
    change_tensors(checkpoint, lambda s: s[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinite"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["head.weight_scale", "blocks.1.mlp.fc1.input_scale", "blocks.0.attn.product.scales"],
)
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0])
def test_scale_that_is_not_above_zero_is_named(checkpoint: Path, name: str, value: float) -> None:
    change_tensors(checkpoint, lambda s: s[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=f"'{name}' holds a scale"):
        load(checkpoint)


@pytest.mark.parametrize("value", [-1, 256, 2**31 - 1, -(2**31)])
def test_zero_point_out_of_range_is_named(checkpoint: Path, value: int) -> None:
    name = "blocks.0.attn.qkv.input_zero_point"
    change_tensors(checkpoint, lambda s: s[name].fill_(value))
    with pytest.raises(CheckpointError, match=rf"'{name}' is {value}, outside 0\.\.255"):
        load(checkpoint)


def test_every_byte_of_a_weight_is_a_weight(checkpoint: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for name in ("head.weight", "blocks.0.attn.qkv.weight"):
            flat = state[name].view(torch.uint8).view(-1)
            flat.copy_(torch.arange(flat.numel()).to(torch.uint8))

    change_tensors(checkpoint, change)
    model = load(checkpoint)
    assert bool(torch.isfinite(model(some_images(model))).all())


def test_a_flipped_bit_of_a_weight_is_found(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        load(checkpoint)


@pytest.mark.parametrize("found", [None, 3, "", "0" * 64])
def test_weights_of_another_checksum_are_refused(checkpoint: Path, found: object) -> None:
    change_config(checkpoint, lambda c: c.update(sha256=found))
    with pytest.raises(CheckpointError, match="SHA-256 is not the one"):
        load(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_weights_are_refused(checkpoint: Path, length: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


def test_weights_with_bytes_after_the_end_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_weights_whose_header_is_absurdly_long_are_refused(checkpoint: Path, length: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is missing"):
        load(checkpoint)


def test_weights_that_are_a_directory_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)


def test_pickled_weights_are_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(checkpoint)
    assert not (tmp_path / "was run").exists()


@QUICK
@given(st.data())
def test_damaged_weights_raise_nothing_but_checkpoint_error(
    saved: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Damage to a value may pass; nothing but a refusal may come of damage to the header."""
    path = tmp_path / "damaged"
    shutil.copytree(saved, path, dirs_exist_ok=True)
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
    checkpoint: Path, model: QuantizedViT, loaded: LoadedModel
) -> None:
    """Names, types and shapes are the same; only the activation ranges differ."""
    other = load_model(make_vit(seed=1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    assert other.vit.arch == loaded.vit.arch
    save(checkpoint.parent / "other", quantized(other, model.settings))
    shutil.copy(checkpoint.parent / "other" / "model.safetensors", checkpoint)
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        load(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "dfq-checkpoint", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "cut", "array", "null", "object", "binary", "deep", "deep-value", "long-number"],
)
def test_malformed_configuration_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["dfq-sparse-images", "", None, ["dfq-checkpoint"]])
def test_configuration_of_another_format_is_refused(checkpoint: Path, name: Any) -> None:
    change_config(checkpoint, lambda c: c.update(format=name))
    with pytest.raises(CheckpointError, match="not the configuration of a dfq checkpoint"):
        load(checkpoint)


@pytest.mark.parametrize("version", [0, 1, "2", None, [2]])
def test_other_versions_are_refused(checkpoint: Path, version: Any) -> None:
    change_config(checkpoint, lambda c: c.update(format_version=version))
    with pytest.raises(CheckpointError, match="has format version"):
        load(checkpoint)


@pytest.mark.parametrize(
    "field",
    [
        "format",
        "format_version",
        "model",
        "architecture",
        "preprocessing",
        "recipe",
        "activation_ranges",
        "source",
    ],
)
def test_configuration_without_a_field_is_refused(checkpoint: Path, field: str) -> None:
    change_config(checkpoint, lambda c: c.pop(field))
    with pytest.raises(CheckpointError):
        load(checkpoint)


@pytest.mark.parametrize(
    "field", ["model", "architecture", "preprocessing", "recipe", "activation_ranges", "source"]
)
@pytest.mark.parametrize("value", [None, 3, [1, 2], {"unknown": 1}])
def test_field_of_the_wrong_kind_is_refused(checkpoint: Path, field: str, value: Any) -> None:
    if (field, value) == ("source", {"unknown": 1}):
        value = "text"  # a source may hold anything
    change_config(checkpoint, lambda c: c.update({field: value}))
    with pytest.raises(CheckpointError):
        load(checkpoint)


ARCHITECTURE = [f.name for f in dataclasses.fields(Architecture)]


@pytest.mark.parametrize("field", ARCHITECTURE)
def test_architecture_without_a_field_is_refused(checkpoint: Path, field: str) -> None:
    change_config(checkpoint, lambda c: c["architecture"].pop(field))
    with pytest.raises(CheckpointError, match=field):
        load(checkpoint)


@pytest.mark.parametrize("field", ARCHITECTURE)
@pytest.mark.parametrize(
    "value",
    [None, "text", -1, [], {}, [1.5, 2], math.nan, math.inf, 10**400],
    ids=lambda v: str(v)[:15],
)
def test_architecture_with_a_bad_value_is_refused(checkpoint: Path, field: str, value: Any) -> None:
    change_config(checkpoint, lambda c: c["architecture"].update({field: value}))
    with pytest.raises(CheckpointError, match=rf"Architecture\.{field}|no finite number"):
        load(checkpoint)


@pytest.mark.parametrize("section", ["architecture", "preprocessing"])
def test_description_with_another_field_is_refused(checkpoint: Path, section: str) -> None:
    change_config(checkpoint, lambda c: c[section].update(later=1))
    with pytest.raises(CheckpointError, match="later"):
        load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 66},
        {"depth": 0},
        {"depth": 3},
        {"num_classes": 0},
        {"num_classes": 6},
        {"num_prefix_tokens": 0},
        {"image_size": [16, 20]},
        {"image_size": [3, 16]},
        {"patch_size": [17, 4]},
        {"in_channels": 1},
        {"in_channels": 0},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"head_dim": 0},
        {"mlp_hidden": 0},
        {"qk_norm": True},
        {"final_norm": False},
    ],
    ids=str,
)
def test_architecture_that_does_not_fit_the_tensors_is_refused(
    checkpoint: Path, changes: dict[str, Any]
) -> None:
    change_config(checkpoint, lambda c: c["architecture"].update(changes))
    with pytest.raises(CheckpointError):
        load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": LIMIT},
        {"mlp_hidden": LIMIT},
        {"embed_dim": LIMIT, "mlp_hidden": LIMIT},
        {"num_heads": LIMIT, "head_dim": LIMIT},
        {"num_classes": LIMIT, "embed_dim": LIMIT},
        {"num_prefix_tokens": LIMIT, "embed_dim": LIMIT},
        {"image_size": [LIMIT, LIMIT], "patch_size": [1, 1]},
        {"image_size": [LIMIT, LIMIT], "patch_size": [LIMIT, LIMIT]},
        {"image_size": [LIMIT, LIMIT], "patch_size": [LIMIT, LIMIT], "embed_dim": LIMIT},
        {"depth": 4097},
        {"depth": LIMIT},
        {"embed_dim": 2**20},
        {"embed_dim": 2**63},
        {"depth": 10**400},
    ],
    ids=lambda c: str(c)[:60],
)
def test_architecture_of_absurd_size_is_refused(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Most of these would take terabytes."""
    change_config(checkpoint, lambda c: c["architecture"].update(changes))
    with pytest.raises(CheckpointError):
        load(checkpoint)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that operations have put into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type != "meta":
            self.elements = max(self.elements, result.numel())
        return result


def test_tensors_of_a_loaded_model_are_counted(checkpoint: Path) -> None:
    """The next test sees what it is meant to see."""
    with LargestTensor() as largest:
        load(checkpoint)
    assert largest.elements >= 256 * 64 // 2


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 2048, "mlp_hidden": 4096},
        {"num_heads": 1024, "head_dim": 64},
        {"num_classes": 2**17},
        {"image_size": [1024, 1024], "patch_size": [2, 2]},
        {"image_size": [1024, 1024], "patch_size": [512, 512]},
        {"num_prefix_tokens": 2**17},
    ],
    ids=str,
)
def test_tensors_that_are_not_in_the_file_are_not_allocated(
    checkpoint: Path, changes: dict[str, Any]
) -> None:
    change_config(checkpoint, lambda c: c["architecture"].update(changes))
    with LargestTensor() as largest, pytest.raises(CheckpointError):
        load(checkpoint)
    assert largest.elements <= 256 * 64


def test_format_5_had_the_full_range(checkpoint: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        config["format_version"] = 5
        del config["recipe"]["quantization"]["reduce_range"]

    assert read_info(checkpoint).recipe.quantization.reduce_range
    change_config(checkpoint, older)
    assert not read_info(checkpoint).recipe.quantization.reduce_range
    load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": [0.5, 0.4]},
        {"std": [0.5]},
        {"std": [0.2, 0.0, 0.2]},
        {"std": [0.2, -0.1, 0.2]},
        {"std": [0.2, 0.1, math.nan]},
        {"mean": [0.2, 0.1, math.inf]},
        {"mean": []},
        {"mean": 0.5},
        {"mean": [True, 0.1, 0.1]},
        {"mean": [10**400, 0, 0]},
        {"mean": [0.1] * 2000, "std": [0.1] * 2000},
        {"interpolation": 3},
        {"crop_mode": None},
        {"crop_pct": "1"},
        {"crop_pct": math.nan},
        {"crop_pct": -0.5},
    ],
    ids=lambda c: str(c)[:40],
)
def test_bad_preprocessing_is_refused(checkpoint: Path, changes: dict[str, Any]) -> None:
    change_config(checkpoint, lambda c: c["preprocessing"].update(changes))
    with pytest.raises(CheckpointError):
        load(checkpoint)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("quantization", "later", 1),
        ("quantization", "bits", 9),
        ("quantization", "bits", "4"),
        ("quantization", "bits", 4.0),
        ("quantization", "attention", "int4"),
        ("inversion", "images", 0),
        ("inversion", "lr", math.nan),
    ],
)
def test_bad_recipe_is_refused(checkpoint: Path, section: str, key: str, value: Any) -> None:
    change_config(checkpoint, lambda c: c["recipe"][section].update({key: value}))
    with pytest.raises(CheckpointError, match=f"{key}|no finite number"):
        load(checkpoint)


def test_recipe_of_another_scheme_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c["recipe"]["quantization"].update(bits=8))
    with pytest.raises(CheckpointError, match="missing or unknown"):
        load(checkpoint)


def test_recipe_of_other_groups_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c["recipe"]["quantization"].update(group=16))
    with pytest.raises(CheckpointError, match=r"group_scale' is"):
        load(checkpoint)


def test_recipe_of_other_attention_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c["recipe"]["quantization"].update(attention="float"))
    with pytest.raises(CheckpointError, match="missing or unknown"):
        load(checkpoint)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1 - 1e-5, 1 + 1e-5, 1e300])
@pytest.mark.parametrize("bound", [0, 1])
def test_activation_range_that_contradicts_the_tensors_is_named(
    checkpoint: Path, bound: int, factor: float
) -> None:
    site = "blocks.1.mlp.fc2"

    def change(config: dict[str, Any]) -> None:
        config["activation_ranges"][site][bound] *= factor

    change_config(checkpoint, change)
    with pytest.raises(CheckpointError, match=f"'{site}' spans"):
        load(checkpoint)


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [],
        [0.0],
        [0.0, 1.0, 2.0],
        ["0", "1"],
        [None, None],
        {"0": 0, "1": 1},
        [math.nan, math.nan],
        [-math.inf, math.inf],
        [10**400, 0],
    ],
    ids=lambda v: str(v)[:15],
)
def test_activation_range_that_is_no_pair_is_named(checkpoint: Path, value: Any) -> None:
    change_config(checkpoint, lambda c: c["activation_ranges"].update(head=value))
    with pytest.raises(CheckpointError, match=r"'head' spans|no finite number"):
        load(checkpoint)


def test_activation_range_of_no_site_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c["activation_ranges"].update(other=[0.0, 1.0]))
    with pytest.raises(CheckpointError, match="activation_ranges"):
        load(checkpoint)


def test_missing_activation_range_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, lambda c: c["activation_ranges"].pop("head"))
    with pytest.raises(CheckpointError, match="activation_ranges"):
        load(checkpoint)


# the output directory


def test_new_place_is_free(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "out")
    assert tree(tmp_path) == {}


def test_empty_directory_is_free(tmp_path: Path, model: QuantizedViT) -> None:
    save(tmp_path, model)
    assert (tmp_path / "config.json").is_file()


def test_checkpoint_is_replaced_whole(checkpoint: Path, model: QuantizedViT, saved: Path) -> None:
    change_config(checkpoint, lambda c: c.update(format_version=99))
    (checkpoint / "model.safetensors").write_bytes(b"")
    (checkpoint / "report.json").write_text("{}")
    save(checkpoint, model)
    assert tree(checkpoint) == tree(saved)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_file_is_refused(tmp_path: Path, model: QuantizedViT) -> None:
    (tmp_path / "out").write_bytes(b"kept")
    with pytest.raises(OutputError, match="is a file"):
        save(tmp_path / "out", model)
    assert tree(tmp_path) == {"out": b"kept"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b'{"format": "dfq-sparse-images"}',
        b'"dfq-checkpoint"',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=["none", "empty", "array", "object", "dataset", "string", "binary", "deep"],
)
def test_foreign_directory_is_refused_and_left_as_it_is(
    tmp_path: Path, model: QuantizedViT, content: bytes | None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"kept")
    if content is not None:
        (tmp_path / "out" / "config.json").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="something other than a dfq checkpoint"):
        save(tmp_path / "out", model)
    assert tree(tmp_path) == before


def test_place_below_a_file_is_refused(tmp_path: Path, model: QuantizedViT) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "out", model)
    assert tree(tmp_path) == {"file": b"kept"}


def test_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize("place", ["free", "checkpoint"])
def test_full_disk_leaves_what_was_there(
    checkpoint: Path, model: QuantizedViT, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before, fsync, files = tree(checkpoint.parent), os.fsync, 0

    def full_after_two(descriptor: int) -> None:
        nonlocal files
        files += 1
        if files > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_two)
    with pytest.raises(OutputError, match="No space left"):
        save(checkpoint.parent / place, model)
    assert tree(checkpoint.parent) == before


def test_configuration_is_written_last(
    tmp_path: Path, model: QuantizedViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save(tmp_path / "out", model)
    assert written == ["model.safetensors", "recipe.toml", "config.json", "out"]


# beside the reader written from docs/checkpoint-format.md

DOCUMENTED: list[tuple[int, str, str]] = [
    (8, "float", "rectangles"),
    (4, "int8", "odd"),
    (8, "int8", "average"),
    (4, "float", "registers"),
    (4, "int8", "normed"),
    (8, "float", "quick"),
    (4, "float", "tanh"),
    *[(8, "float", family.name) for family in FAMILIES],
    (4, "int8", "BEiT, BEiTv2"),
    (4, "int8", "DINOv3, SwiGLU"),
    (4, "float", "SigLIP towers"),
]


@pytest.mark.parametrize(("bits", "attention", "variant"), DOCUMENTED)
def test_reader_written_from_the_specification_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Any, attention: Any, variant: str
) -> None:
    """A sum in another order may move an activation by a level; a misreading moves them all."""
    monkeypatch.setattr("dfq.quantization.model.attention_dtype", lambda _: torch.float32)
    family = {family.name: family.make for family in FAMILIES}.get(variant)
    built = family() if family else make_vit(**VARIANTS[variant])
    loaded = load_model(built, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    settings = QuantizationSettings(bits=bits, attention=attention, group=16)
    save(tmp_path / "out", quantized(loaded, settings))
    model = load(tmp_path / "out").set_backend("reference")
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, *model.arch.image_size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std)
    )
    expected = model((pixels / 255 - mean) / std).numpy()
    found = DocumentedReader(tmp_path / "out")(pixels.numpy())
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "attention"), [(8, "float"), (4, "int8")])
def test_specified_tensors_are_the_stored_ones(
    tmp_path: Path, loaded: LoadedModel, bits: Any, attention: Any
) -> None:
    save(tmp_path, quantized(loaded, QuantizationSettings(bits=bits, attention=attention)))
    tensors = load_numpy((tmp_path / "model.safetensors").read_bytes())
    packed = bits == 4
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "prefix": ("float32", (1, 64)),
        "pos_embed": ("float32", (16, 64)),
    }

    def norm(name: str) -> None:
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = ("float32", (64,))

    def linear(name: str, inputs: int, outputs: int, packed: bool) -> None:
        columns = (inputs + 1) // 2 if packed else inputs
        expected[f"{name}.weight"] = ("uint8" if packed else "int8", (outputs, columns))
        if packed:
            expected[f"{name}.group_scale"] = ("uint8", (outputs, -(-inputs // 32)))
        expected[f"{name}.weight_scale"] = expected[f"{name}.bias"] = ("float32", (outputs,))
        expected[f"{name}.input_scale"] = ("float32", ())
        expected[f"{name}.input_zero_point"] = ("int32", ())

    linear("patch_embed", 48, 64, packed=False)
    linear("head", 64, 5, packed=False)
    norm("norm")
    for i in range(2):
        norm(f"blocks.{i}.norm1")
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.attn.qkv", 64, 192, packed)
        linear(f"blocks.{i}.attn.proj", 64, 64, packed)
        linear(f"blocks.{i}.mlp.fc1", 64, 256, packed)
        linear(f"blocks.{i}.mlp.fc2", 256, 64, packed)
        if attention == "int8":
            expected[f"blocks.{i}.attn.product.scales"] = ("float32", (3,))
    assert {k: (str(t.dtype), t.shape) for k, t in tensors.items()} == expected


def test_activation_ranges_are_as_specified(checkpoint: Path) -> None:
    tensors = load_numpy((checkpoint / "model.safetensors").read_bytes())
    ranges = json.loads((checkpoint / "config.json").read_text())["activation_ranges"]
    expected: dict[str, list[float]] = {}
    for name in tensors:
        if name.endswith(".input_scale"):
            site = name.removesuffix(".input_scale")
            s, z = float(tensors[name]), int(tensors[f"{site}.input_zero_point"])
            expected[site] = [-z * s, (255 - z) * s]
        elif name.endswith(".product.scales"):
            block = name.removesuffix(".product.scales")
            scales = tensors[name].astype(float).tolist()
            for site, s in zip("qkv", scales, strict=True):
                expected[f"{block}.{site}"] = [-127 * s, 127 * s]
    assert ranges.keys() == expected.keys()
    for site, bounds in expected.items():
        assert ranges[site] == pytest.approx(bounds)
    assert len(ranges) == 16


def test_patch_embedding_takes_pixels_as_they_are(checkpoint: Path) -> None:
    tensors = load_numpy((checkpoint / "model.safetensors").read_bytes())
    assert tensors["patch_embed.input_scale"] == F32(1 / 255)
    assert tensors["patch_embed.input_zero_point"] == 0


def test_normalisation_is_folded_into_the_patch_embedding(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    save(tmp_path, quantized(loaded, QuantizationSettings()))
    tensors = load_numpy((tmp_path / "model.safetensors").read_bytes())
    mean, std = (np.repeat(v, 16) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    assert isinstance(loaded.vit.patch_embed, torch.nn.Linear)
    weight = loaded.vit.patch_embed.weight.numpy() / std
    stored = tensors["patch_embed.weight"] * tensors["patch_embed.weight_scale"][:, None]
    bias = loaded.vit.patch_embed.bias.numpy() - stored @ mean
    np.testing.assert_allclose(tensors["patch_embed.bias"], bias, rtol=1e-4, atol=1e-5)
    assert np.abs(stored - weight).mean() < 0.02 * np.abs(weight).mean()


@pytest.mark.parametrize(
    ("bits", "reduced", "low", "high"),
    [(4, False, -128, 112), (8, False, -127, 127), (4, True, -64, 56), (8, True, -63, 63)],
)
def test_weights_are_in_the_specified_range(
    tmp_path: Path, loaded: LoadedModel, bits: Any, reduced: bool, low: int, high: int
) -> None:
    model = quantized(loaded, QuantizationSettings(bits=bits, reduce_range=reduced))
    save(tmp_path / "out", model)
    reader = DocumentedReader(tmp_path / "out")
    for i in range(2):
        for layer, inputs in (("attn.qkv", 64), ("mlp.fc2", 256)):
            weight = reader.weight(f"blocks.{i}.{layer}", inputs)
            assert low <= weight.min() < low / 2
            assert high / 2 < weight.max() <= high
