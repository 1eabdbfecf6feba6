"""Folders that timm saved: their description is checked field by field, their weights are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from malformed_json import MALFORMED
from people_weights import SMALL, assert_same
from safetensors.torch import save_file

from dfq.errors import UnknownModelError, UnsupportedModelError, UsageError, WeightsError
from dfq.vit import Preprocessing
from dfq.vit.load import load_model, load_structure

DATA = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, timm_vit: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_file(timm_vit.state_dict(), folder / "model.safetensors")
    return folder


def described(folder: Path, **changes: Any) -> str:
    arguments = SMALL | changes.pop("arguments", {})
    data = DATA | changes.pop("data", {})
    config = {"architecture": "vit_base_patch16_224", "model_args": arguments}
    content = config | {"pretrained_cfg": data} | changes
    (folder / "config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"


def test_a_well_formed_description_is_read(saved: Path, timm_vit: Any) -> None:
    loaded = load_model(described(saved))
    assert_same(loaded, timm_vit)
    assert loaded.preprocessing == Preprocessing((0.5,) * 3, (0.25,) * 3, "bilinear", 0.9)


def test_a_description_of_one_level_is_read(saved: Path) -> None:
    """As timm wrote them first; sizes come from the weights and the caller."""
    config = {"architecture": "vit_base_patch16_224", "num_classes": 5, **DATA}
    (saved / "config.json").write_text(json.dumps(config))
    found = load_structure(f"local-dir:{saved}")
    assert found.preprocessing.interpolation == "bilinear"
    assert found.preprocessing.std == (0.25,) * 3


def test_fields_that_are_null_are_timms_defaults(saved: Path) -> None:
    absent = {"mean": None, "std": None, "crop_pct": None, "interpolation": None}
    found = load_model(described(saved, data=absent)).preprocessing
    assert (found.interpolation, found.crop_pct) == ("bicubic", 0.875)


MALFORMED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"architecture": 5}, "architecture in its config.json is 5"),
    ({"architecture": []}, r"architecture in its config.json is \[\]"),
    ({"architecture": "vit_bse_patch16_224"}, "no model of timm .* Did you mean 'vit_base"),
    ({"model_args": 5}, "model_args .* is 5; it must be an object"),
    ({"pretrained_cfg": 5}, "pretrained_cfg .* is 5; it must be an object"),
    ({"pretrained_cfg": []}, r"pretrained_cfg .* is \[\]; it must be an object"),
    ({"num_classes": -1}, "num_classes .* is -1; it must be a whole number from 0"),
    ({"num_classes": "5"}, "num_classes .* is '5'"),
    ({"data": {"num_classes": [5]}}, r"num_classes .* is \[5\]"),
    ({"data": {"mean": "abc"}}, "mean .* is 'abc'; it must be a list of 1 to 1024 numbers"),
    ({"data": {"mean": [True] * 3}}, "mean .* is"),
    ({"data": {"mean": []}}, r"mean .* is \[\]"),
    ({"data": {"std": [None]}}, r"std .* is \[None\]"),
    ({"data": {"std": [10**400] * 3}}, "std .* is"),
    ({"data": {"mean": None}}, "mean .* is None; it must be given beside std"),
    ({"data": {"std": None}}, "std .* is None; it must be given beside mean"),
    ({"data": {"crop_pct": "x"}}, r"crop_pct .* is 'x'; it must be a number from 0\.05 to 1"),
    ({"data": {"crop_pct": 0}}, "crop_pct .* is 0"),
    ({"data": {"crop_pct": 10**400}}, "crop_pct .* is 10000"),
    ({"data": {"interpolation": "area"}}, "interpolation .* is 'area'; .* bicubic, lanczos"),
    ({"data": {"interpolation": ["bicubic"]}}, "interpolation .* is"),
    ({"data": {"crop_mode": "corner"}}, "crop_mode .* is 'corner'; .* center, squash, border"),
    ({"data": {"input_size": []}}, r"input_size .* is \[\]; .* channels, height and width"),
    ({"data": {"input_size": [3, 0, 32]}}, "input_size .* is"),
    ({"data": {"test_input_size": 5}}, "test_input_size .* is 5"),
    ({"data": {"fixed_input_size": "yes"}}, "fixed_input_size .* is 'yes'"),
    ({"data": {"global_pool": 5}}, "global_pool .* is 5"),
    ({"arguments": {"embed_dim": 0}}, r"model_args\.embed_dim .* is 0; .* from 1 to 16,384"),
    ({"arguments": {"num_heads": 0}}, r"model_args\.num_heads .* is 0"),
    ({"arguments": {"patch_size": 0}}, r"model_args\.patch_size .* is 0"),
    ({"arguments": {"patch_size": [16, "16"]}}, r"model_args\.patch_size .* is"),
    ({"arguments": {"depth": 10**8}}, r"model_args\.depth .* is 100000000"),
    ({"arguments": {"depth": True}}, r"model_args\.depth .* is True"),
    ({"arguments": {"reg_tokens": 10**8}}, r"model_args\.reg_tokens .* numbers up to 1048576"),
    ({"arguments": {"drop_path_rate": [10**400]}}, r"model_args\.drop_path_rate"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED_FIELDS, ids=lambda v: str(v)[:60])
def test_a_malformed_field_is_named(saved: Path, changes: dict[str, Any], message: str) -> None:
    name = described(saved, **changes)
    for load in (load_model, load_structure):
        with pytest.raises(UnknownModelError, match=message) as caught:
            load(name)
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": {"no_such_keyword": 1}},
        {"arguments": {"pretrained": True}},
        {"arguments": {"norm_layer": "nothing"}},
        {"arguments": {"embed_dim": 49}},
        {"arguments": {"class_token": {}, "reg_tokens": -3}},
        {"arguments": {"act_layer": 5}},
        {"data": {"no_such_field": 1}},
    ],
    ids=str,
)
def test_arguments_that_timm_does_not_take_are_refused(
    saved: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not take what its description says \("):
        load_model(described(saved, **changes))


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_damaged_description_is_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(UnknownModelError, match=r"config\.json"):
        load_model(f"local-dir:{saved}")


def test_a_module_with_a_malformed_data_config_is_refused() -> None:
    for data, message in (
        ({"interpolation": "area"}, "interpolation in its pretrained_cfg is 'area'"),
        ({"mean": "abc"}, "mean in its pretrained_cfg is 'abc'"),
    ):
        model = timm.create_model("test_vit", pretrained_cfg_overlay=data)
        with pytest.raises(UnsupportedModelError, match=message):
            load_model(model)


# ---- the file of weights in a folder


def test_the_only_file_of_weights_is_taken_whatever_its_name(
    saved: Path, timm_vit: Any, tmp_path: Path
) -> None:
    shutil.copy(saved / "model.safetensors", tmp_path / "mine.safetensors")
    assert_same(load_model(described(tmp_path)), timm_vit)


def test_a_name_of_timms_comes_before_others(saved: Path, timm_vit: Any, tmp_path: Path) -> None:
    shutil.copy(saved / "model.safetensors", tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "before.pth")
    assert_same(load_model(described(tmp_path)), timm_vit)


def test_several_files_of_weights_need_one_to_be_named(
    saved: Path, timm_vit: Any, tmp_path: Path
) -> None:
    for epoch in range(3):
        shutil.copy(saved / "model.safetensors", tmp_path / f"epoch{epoch}.safetensors")
    name = described(tmp_path)
    with pytest.raises(
        WeightsError, match=r"3 files of weights \('epoch0.*'epoch2.*weights=FILE|with weights"
    ):
        load_model(name)
    assert_same(load_model(name, weights=tmp_path / "epoch1.safetensors"), timm_vit)


def test_an_index_of_any_name_is_found(timm_vit: Any, tmp_path: Path) -> None:
    state = timm_vit.state_dict()
    names = {key: f"m-0000{1 + ('block' in key)}-of-00002.safetensors" for key in state}
    for file in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == file}, tmp_path / file)
    with pytest.raises(WeightsError, match=r"one of several files.*\.index\.json"):
        load_model(described(tmp_path))
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same(load_model(described(tmp_path)), timm_vit)


@pytest.mark.parametrize("prefix", ["Local-Dir:", "local-dir :", "LOCAL-DIR:"])
def test_the_prefix_has_one_spelling(saved: Path, prefix: str) -> None:
    with pytest.raises(UsageError, match="no address of a model"):
        load_model(f"{prefix}{saved}")
