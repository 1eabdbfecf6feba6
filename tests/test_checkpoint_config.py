"""A checkpoint's configuration that is damaged or contradicts its weights is refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_checkpoints import change_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.checkpoint import load, read_info, verified_digest
from dfq.errors import CheckpointError
from dfq.files import read_json
from dfq.vit import Architecture

LIMIT = 2**20 - 1


@pytest.mark.parametrize("name", ["dfq-sparse-images", "", None, ["dfq-checkpoint"]])
def test_configuration_of_another_format_is_refused(w4a8: Path, name: Any) -> None:
    change_config(w4a8, lambda c: c.update(format=name))
    with pytest.raises(CheckpointError, match="not the configuration of a dfq checkpoint"):
        load(w4a8)


@pytest.mark.parametrize("version", [0, 1, "2", None, [2]])
def test_other_versions_are_refused(w4a8: Path, version: Any) -> None:
    change_config(w4a8, lambda c: c.update(format_version=version))
    with pytest.raises(CheckpointError, match="has format version"):
        load(w4a8)


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
def test_configuration_without_a_field_is_refused(w4a8: Path, field: str) -> None:
    change_config(w4a8, lambda c: c.pop(field))
    with pytest.raises(CheckpointError):
        load(w4a8)


@pytest.mark.parametrize(
    "field", ["model", "architecture", "preprocessing", "recipe", "activation_ranges", "source"]
)
@pytest.mark.parametrize("value", [None, 3, [1, 2], {"unknown": 1}])
def test_field_of_the_wrong_kind_is_refused(w4a8: Path, field: str, value: Any) -> None:
    if (field, value) == ("source", {"unknown": 1}):
        value = "text"  # a source may hold anything
    change_config(w4a8, lambda c: c.update({field: value}))
    with pytest.raises(CheckpointError):
        load(w4a8)


ARCHITECTURE = [f.name for f in dataclasses.fields(Architecture)]


@pytest.mark.parametrize("field", ARCHITECTURE)
def test_architecture_without_a_field_is_refused(w4a8: Path, field: str) -> None:
    change_config(w4a8, lambda c: c["architecture"].pop(field))
    with pytest.raises(CheckpointError, match=field):
        load(w4a8)


@pytest.mark.parametrize("field", ARCHITECTURE)
@pytest.mark.parametrize(
    "value",
    [None, "text", -1, [], {}, [1.5, 2], math.nan, math.inf, 10**400],
    ids=lambda v: str(v)[:15],
)
def test_architecture_with_a_bad_value_is_refused(w4a8: Path, field: str, value: Any) -> None:
    change_config(w4a8, lambda c: c["architecture"].update({field: value}))
    with pytest.raises(CheckpointError, match=rf"Architecture\.{field}|no finite number"):
        load(w4a8)


@pytest.mark.parametrize("section", ["architecture", "preprocessing"])
def test_description_with_another_field_is_refused(w4a8: Path, section: str) -> None:
    change_config(w4a8, lambda c: c[section].update(later=1))
    with pytest.raises(CheckpointError, match="later"):
        load(w4a8)


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
    w4a8: Path, changes: dict[str, Any]
) -> None:
    change_config(w4a8, lambda c: c["architecture"].update(changes))
    with pytest.raises(CheckpointError):
        load(w4a8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 4097}, "depth is 4097; it must be at most 4096"),
        ({"image_size": [3, 16]}, r"image_size is \[3, 16\], less than a patch_size of"),
        ({"pool": "map"}, "pool_heads is 0"),
        ({"pool": "map", "pool_heads": 2}, "pool_hidden is 0"),
        (
            {"pool": "map", "pool_heads": 7, "pool_hidden": 4},
            r"embed_dim is \d+; it must be a multiple of pool_heads \(7\)",
        ),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens is 0; a pool of 'token' needs at least 1"),
        (
            {"pool": "distilled", "num_prefix_tokens": 1},
            "num_prefix_tokens is 1; a pool of 'distilled' needs at least 2",
        ),
        ({"rope": True, "head_dim": 3}, "head_dim is 3; with rope it must be even"),
        ({"rope": True, "relative_bias": True}, "rope and relative_bias are both true"),
        ({"class_token": False}, "class_token is false; a pool of 'token' needs it"),
        (
            {"relative_bias": True, "num_prefix_tokens": 2},
            "num_prefix_tokens is 2; with relative_bias it must be 1",
        ),
    ],
    ids=str,
)
def test_a_contradiction_within_the_architecture_names_its_fields(
    w4a8: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(w4a8, lambda c: c["architecture"].update(changes))
    with pytest.raises(CheckpointError, match=f"architecture: {message}"):
        read_info(w4a8)


@pytest.mark.parametrize("read", [load, verified_digest])
def test_the_configuration_is_read_once(
    w4a8: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def counted(path: Path) -> Any:
        seen.append(path)
        return read_json(path)

    monkeypatch.setattr("dfq.checkpoint.read_json", counted)
    read(w4a8)
    assert seen == [w4a8 / "config.json"]


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
def test_architecture_of_absurd_size_is_refused(w4a8: Path, changes: dict[str, Any]) -> None:
    """Most of these would take terabytes."""
    change_config(w4a8, lambda c: c["architecture"].update(changes))
    with pytest.raises(CheckpointError):
        load(w4a8)


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


def test_tensors_of_a_loaded_model_are_counted(w4a8: Path) -> None:
    """The next test sees what it is meant to see."""
    with LargestTensor() as largest:
        load(w4a8)
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
    w4a8: Path, changes: dict[str, Any]
) -> None:
    change_config(w4a8, lambda c: c["architecture"].update(changes))
    with LargestTensor() as largest, pytest.raises(CheckpointError):
        load(w4a8)
    assert largest.elements <= 256 * 64


def test_format_5_had_the_full_range(w4a8: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        config["format_version"] = 5
        del config["recipe"]["quantization"]["reduce_range"]

    assert read_info(w4a8).recipe.quantization.reduce_range
    change_config(w4a8, older)
    assert not read_info(w4a8).recipe.quantization.reduce_range
    load(w4a8)


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
def test_bad_preprocessing_is_refused(w4a8: Path, changes: dict[str, Any]) -> None:
    change_config(w4a8, lambda c: c["preprocessing"].update(changes))
    with pytest.raises(CheckpointError):
        load(w4a8)


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
def test_bad_recipe_is_refused(w4a8: Path, section: str, key: str, value: Any) -> None:
    change_config(w4a8, lambda c: c["recipe"][section].update({key: value}))
    with pytest.raises(CheckpointError, match=f"{key}|no finite number"):
        load(w4a8)


def test_recipe_of_another_scheme_is_refused(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c["recipe"]["quantization"].update(bits=8))
    with pytest.raises(CheckpointError, match="missing or unknown"):
        load(w4a8)


def test_recipe_of_other_groups_is_refused(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c["recipe"]["quantization"].update(group=16))
    with pytest.raises(CheckpointError, match=r"group_scale' is"):
        load(w4a8)


def test_recipe_of_other_attention_is_refused(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c["recipe"]["quantization"].update(attention="float"))
    with pytest.raises(CheckpointError, match="missing or unknown"):
        load(w4a8)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1 - 1e-5, 1 + 1e-5, 1e300])
@pytest.mark.parametrize("bound", [0, 1])
def test_activation_range_that_contradicts_the_tensors_is_named(
    w4a8: Path, bound: int, factor: float
) -> None:
    site = "blocks.1.mlp.fc2"

    def change(config: dict[str, Any]) -> None:
        config["activation_ranges"][site][bound] *= factor

    change_config(w4a8, change)
    with pytest.raises(CheckpointError, match=f"'{site}' spans"):
        load(w4a8)


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
def test_activation_range_that_is_no_pair_is_named(w4a8: Path, value: Any) -> None:
    change_config(w4a8, lambda c: c["activation_ranges"].update(head=value))
    with pytest.raises(CheckpointError, match=r"'head' spans|no finite number"):
        load(w4a8)


def test_activation_range_of_no_site_is_refused(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c["activation_ranges"].update(other=[0.0, 1.0]))
    with pytest.raises(CheckpointError, match="activation_ranges"):
        load(w4a8)


def test_missing_activation_range_is_refused(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c["activation_ranges"].pop("head"))
    with pytest.raises(CheckpointError, match="activation_ranges"):
        load(w4a8)
