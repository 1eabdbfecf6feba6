"""Names of models, modules in memory, and their settings."""

from __future__ import annotations

import copy
import socket
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from vit_weights import NAME, timm_model

from dfq.errors import (
    PretrainedError,
    SettingError,
    UnknownModelError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from dfq.vit import Preprocessing
from dfq.vit.load import ALIASES, LoadedModel, fingerprint, load_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing of the hub's in the local cache."""

    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))


# ---- names


def test_a_name_of_timm_gives_its_architecture(weights_file: Path) -> None:
    loaded = load_model("vit_tiny_patch16_224", weights=weights_file, img_size=32)
    arch = loaded.vit.arch
    assert (loaded.name, loaded.timm_name) == ("vit_tiny_patch16_224", "vit_tiny_patch16_224")
    assert (arch.embed_dim, arch.depth, arch.num_heads) == (192, 12, 3)
    assert (arch.image_size, arch.num_classes) == ((32, 32), 5)


def test_an_alias_is_the_model_it_stands_for(weights_file: Path) -> None:
    short = load_model("vit_tiny", weights=weights_file, img_size=32)
    full = load_model("vit_tiny_patch16_224", weights=weights_file, img_size=32)
    assert (short.name, short.timm_name) == ("vit_tiny", "vit_tiny_patch16_224")
    assert short.fingerprint == full.fingerprint


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_has_pretrained_weights(alias: str) -> None:
    assert timm.is_model_pretrained(ALIASES[alias])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("deit_tiny_patch16_225", "deit_tiny_patch16_224"),
        ("vit_bse", "vit_base"),
        ("deit_smal", "deit_small"),
        ("dmo", "demo"),
    ],
)
def test_a_typo_gets_the_nearest_name(typo: str, meant: str) -> None:
    with pytest.raises(UnknownModelError, match=f"Unknown model '{typo}'") as caught:
        load_model(typo)
    assert f"'{meant}'" in str(caught.value)


@pytest.mark.parametrize("name", [" ", "zzzzqqqq", "vit_tiny_patch16_224 ", "../weights"])
def test_a_name_like_nothing_is_told_where_names_are_listed(name: str) -> None:
    with pytest.raises(UnknownModelError, match="dfq models"):
        load_model(name)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(SettingError, match="model is empty"):
        load_model("")


def test_a_wrong_tag_gets_the_tags_there_are() -> None:
    with pytest.raises(UnknownModelError, match=r"'nope'.*augreg_in21k_ft_in1k"):
        load_model("vit_base_patch16_224.nope")


@pytest.mark.parametrize("name", ["foo:bar", "hf-hub:", "hf-hub:not a repo", "local-dir:"])
def test_an_address_of_no_known_form_is_refused(name: str) -> None:
    with pytest.raises(UnknownModelError, match=name):
        load_model(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_other_kinds_of_models_are_refused_before_any_download(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Supported"):
        load_model(name)


def test_a_model_without_pretrained_weights_asks_for_a_file() -> None:
    with pytest.raises(PretrainedError, match=r"no pretrained weights.*with weights"):
        load_model("vit_base_patch16_gap_224")


@pytest.mark.usefixtures("offline")
def test_another_number_of_classes_than_pretrained_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"1000 classes, not 5.*Leave num_classes"):
        load_model("vit_base_patch16_224", num_classes=5)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_chans": 1}, r"take 3 channels, not 1.*in_chans out"),
        (
            {"global_pool": "map"},
            r"pooled by 'token' and cannot.*'map'.*Leave global_pool",
        ),
        ({"img_size": [224, 8]}, r"img_size is \(224, 8\), less than a patch of 16 pixels"),
    ],
    ids=str,
)
def test_what_pretrained_weights_are_not_is_refused_before_any_download(
    option: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_model("vit_base_patch16_224", **option)


# ---- no network


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny",
        "vit_base_patch16_224.augreg_in1k",
        "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ],
)
def test_without_a_network_the_way_out_is_a_file(name: str) -> None:
    with pytest.raises(PretrainedError, match=r"cannot be downloaded.*with weights"):
        load_model(name)


@pytest.mark.usefixtures("offline")
def test_an_address_with_weights_still_needs_its_description(weights_file: Path) -> None:
    with pytest.raises(PretrainedError, match="cannot be downloaded"):
        load_model("hf-hub:timm/vit_tiny_patch16_224.augreg_in1k", weights=weights_file)


@pytest.mark.usefixtures("offline")
def test_looking_for_the_network_leaves_the_hub_as_it_was() -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(PretrainedError):
        load_model("vit_tiny")
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("offline")
def test_a_file_of_weights_needs_no_network(weights_file: Path) -> None:
    assert load_model("vit_tiny", weights=weights_file, img_size=32).vit.arch.num_classes == 5


# ---- modules in memory


def test_a_module_of_timm_is_called_what_timm_calls_it() -> None:
    assert load_model(timm_model()).name == NAME


def test_a_module_without_a_name_is_called_by_its_class(loaded: LoadedModel) -> None:
    assert loaded.name == "VisionTransformer"


def test_a_module_has_its_own_weights(weights_file: Path) -> None:
    with pytest.raises(SettingError, match="weights goes with a model's name"):
        load_model(timm_model(), weights=weights_file)


def test_a_module_may_be_given_its_own_shape() -> None:
    assert load_model(timm_model(), num_classes=5, img_size=32).vit.arch.num_classes == 5


@pytest.mark.parametrize("option", [{"num_classes": 3}, {"img_size": 48}], ids=str)
def test_a_module_cannot_be_given_another_shape(option: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"num.classes|img.size"):
        load_model(timm_model(), **option)


# ---- settings


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", -1), ("img_size", 0), ("img_size", -1)]
)
def test_sizes_out_of_their_range_are_refused(name: str, value: Any, weights_file: Path) -> None:
    with pytest.raises(SettingError, match=f"{name} is {value}"):
        load_model("vit_tiny", weights=weights_file, **{name: value})


def test_an_image_smaller_than_a_patch_is_refused(weights_file: Path) -> None:
    with pytest.raises(UsageError, match=r"img_size is 8.*16"):
        load_model("vit_tiny", weights=weights_file, img_size=8)


def test_preprocessing_comes_from_timm() -> None:
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    model = timm_model(pretrained_cfg_overlay={**config, "interpolation": "bilinear"})
    expected = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8)
    assert load_model(model).preprocessing == expected


def test_mean_and_std_win_over_timm() -> None:
    loaded = load_model(timm_model(), mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.std == (0.4, 0.5, 0.6)


def test_mean_alone_leaves_std_to_timm() -> None:
    expected = load_model(timm_model()).preprocessing.std
    assert load_model(timm_model(), mean=(0.1, 0.2, 0.3)).preprocessing.std == expected


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("values", [(0.5,), (0.5,) * 4], ids=len)
def test_another_number_of_values_than_channels_is_refused(name: str, values: Any) -> None:
    with pytest.raises(SettingError, match=f"3 channels but {name} has {len(values)}"):
        load_model(timm_model(), **{name: values})


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_mean_and_std_must_be_finite(name: str, value: float) -> None:
    values: Any = (0.5, 0.5, value)
    with pytest.raises(SettingError, match=f"{name} must be finite"):
        load_model(timm_model(), **{name: values})


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_std_must_be_positive(value: float) -> None:
    with pytest.raises(SettingError, match=r"std is .*from 0\.003922 to 1"):
        load_model(timm_model(), std=(0.5, 0.5, value))


# ---- fingerprints

BASE = load_model(make_vit(reg_tokens=1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_the_fingerprint_changes_with_any_weight(data: st.DataObject) -> None:
    vit = copy.deepcopy(BASE.vit)
    tensor = vit.state_dict()[data.draw(st.sampled_from(sorted(vit.state_dict())))]
    at = data.draw(st.integers(0, tensor.numel() - 1))
    before = np.float32(tensor.view(-1)[at].item())
    tensor.view(-1)[at] = float(np.nextafter(before, np.float32(9)))
    assert fingerprint(vit, BASE.preprocessing) != BASE.fingerprint


@pytest.mark.parametrize(
    "changes", [{"mean": (0.5, 0.4, 0.31)}, {"std": (0.2, 0.25, 0.31)}], ids=str
)
def test_the_fingerprint_changes_with_preprocessing(changes: dict[str, Any]) -> None:
    args = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), **changes}
    assert load_model(make_vit(reg_tokens=1), **args).fingerprint != BASE.fingerprint


def test_the_fingerprint_changes_with_the_architecture() -> None:
    token = load_model(make_vit(num_heads=2)).fingerprint
    assert load_model(make_vit(num_heads=4)).fingerprint != token


def test_the_fingerprint_stays_from_load_to_load() -> None:
    again = load_model(make_vit(reg_tokens=1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    assert again.fingerprint == BASE.fingerprint


def test_the_fingerprint_does_not_depend_on_the_name() -> None:
    renamed = LoadedModel("other", "another.tag", BASE.vit, BASE.preprocessing)
    assert renamed.fingerprint == BASE.fingerprint


def test_the_fingerprint_does_not_depend_on_how_numbers_are_written() -> None:
    whole = load_model(make_vit(), mean=(0, 0, 0), std=(1, 1, 1))
    real = load_model(make_vit(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert whole.fingerprint == real.fingerprint


def test_a_model_without_prefix_tokens_has_a_fingerprint() -> None:
    model = make_vit(class_token=False, global_pool="avg")
    assert len(load_model(model).fingerprint) == 64


def test_a_name_with_weights_is_outlined_once(
    small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, outlines = timm.create_model, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        outlines.extend([args] if next(model.parameters()).is_meta else [])
        return model

    monkeypatch.setattr(timm, "create_model", counted)
    load_model("test_vit", weights=small_weights, img_size=32)
    assert len(outlines) == 1
