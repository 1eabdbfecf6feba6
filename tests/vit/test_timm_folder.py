"""Folders that timm saved whose config.json is not as timm writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm

from dfq import load_model
from dfq.errors import DfqError, UnknownModelError

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("timm") / "saved"
    model = timm.create_model("vit_base_patch16_224", num_classes=3, **SMALL)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_args=SMALL)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", "abc"),
        ("mean", []),
        ("mean", None),
        ("std", [None]),
        ("std", [0.0, 1.0, 1.0]),
        ("std", [10**400]),
        ("crop_pct", "x"),
        ("crop_pct", 10**400),
        ("crop_pct", 0),
        ("interpolation", 5),
        ("interpolation", "no such"),
        ("crop_mode", "no such"),
        ("input_size", []),
    ],
)
def test_values_are_refused_by_name(
    field: str, value: Any, config: tuple[Path, dict[str, Any]]
) -> None:
    folder, content = config
    data = {**content["pretrained_cfg"], field: value}
    (folder / "config.json").write_text(json.dumps({**content, "pretrained_cfg": data}))
    with pytest.raises(UnknownModelError, match=f"config.json has {field} .*allowed: "):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("field", ["architecture", "model_args", "pretrained_cfg"])
@pytest.mark.parametrize("value", [5, [], None])
def test_parts_of_another_type_are_refused_by_name(
    field: str, value: Any, config: tuple[Path, dict[str, Any]]
) -> None:
    folder, content = config
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(UnknownModelError, match=f"config.json has .*{field}"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("field", ["embed_dim", "patch_size", "num_heads", "depth"])
@pytest.mark.parametrize("value", [0, -1, "x", None])
def test_models_that_timm_cannot_build_are_refused(
    field: str, value: Any, config: tuple[Path, dict[str, Any]]
) -> None:
    folder, content = config
    args = {**content["model_args"], field: value}
    (folder / "config.json").write_text(json.dumps({**content, "model_args": args}))
    with pytest.raises(DfqError):
        load_model(f"local-dir:{folder}")


def test_what_is_nested_too_deeply_is_refused(config: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = config
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UnknownModelError, match="nested too deeply"):
        load_model(f"local-dir:{folder}")
