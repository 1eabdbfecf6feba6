"""From names and files to models, with a message for everything that can be wrong."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import socket
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
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
from safetensors.torch import save_file
from torch import Tensor, nn

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
from dfq.vit.weights import read_weights

NAME = "test_vit"
"""timm's own test model: 64 wide, 6 blocks, patches of 16 pixels."""


def timm_model(seed: int = 0, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(NAME, **{"img_size": 32, "num_classes": 5, **changes})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return timm_model().state_dict()


def load(path: Path, **changes: Any) -> LoadedModel:
    return load_model(NAME, weights=path, **{"img_size": 32, **changes})


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
    with pytest.raises(PretrainedError, match=r"no pretrained weights.*--weights"):
        load_model("vit_base_patch16_gap_224")


@pytest.mark.usefixtures("offline")
def test_another_number_of_classes_than_pretrained_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"1000 classes, not 5.*--num-classes"):
        load_model("vit_base_patch16_224", num_classes=5)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_chans": 1}, r"take 3 channels, not 1.*--in-chans out"),
        ({"global_pool": "map"}, r"pooled by 'token' and cannot be pooled by 'map'.*--global-pool"),
        ({"img_size": [224, 8]}, "--img-size 224,8 is less than a patch of 16 pixels"),
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
    with pytest.raises(PretrainedError, match=r"cannot be downloaded.*--weights FILE"):
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


# ---- files of weights


def as_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


def as_torch(wrap: Callable[[dict[str, Tensor]], Any], **how: Any) -> Callable[..., None]:
    def write(state: dict[str, Tensor], path: Path) -> None:
        torch.save(wrap(state), path, **how)

    return write


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{k}": v for k, v in state.items()}


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "epoch": 3,
        "arch": NAME,
        "state_dict": OrderedDict(state),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(model=NAME, lr=0.1, opt="adamw"),
        "metric": 81.2,
    }


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.zeros_like(v) for k, v in state.items()}


WRITERS: dict[str, Callable[..., None]] = {
    "safetensors": as_safetensors,
    "state dict": as_torch(dict),
    "ordered state dict": as_torch(OrderedDict),
    "state dict in the old format": as_torch(dict, _use_new_zipfile_serialization=False),
    "training checkpoint": as_torch(training_checkpoint),
    "distributed training": as_torch(prefixed),
    "distributed training checkpoint": as_torch(lambda s: {"state_dict": prefixed(s)}),
    "parameters": as_torch(lambda s: {k: nn.Parameter(v) for k, v in s.items()}),
    "entry of the name model": as_torch(lambda s: {"model": s, "epoch": 1}),
    "averaged weights": as_torch(lambda s: {"state_dict": zeros(s), "state_dict_ema": s}),
    "averaged weights of DeiT": as_torch(lambda s: {"model": zeros(s), "model_ema": s}),
}

writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@writers
def test_every_kind_of_file_gives_the_same_model(
    write: Callable[..., None], state: dict[str, Tensor], tmp_path: Path
) -> None:
    write(state, tmp_path / "weights.bin")
    model = timm_model()
    model.load_state_dict(state)
    expected = load_model(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = load(tmp_path / "weights.bin", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert fingerprint(found.vit, expected.preprocessing) == expected.fingerprint


def test_half_precision_files_are_computed_in_float32(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    loaded = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.vit.parameters()} == {torch.float32}
    found = loaded.vit.get_parameter("head.weight")
    assert torch.equal(found, state["head.weight"].half().float())


def test_the_number_of_classes_is_told_from_the_file(tmp_path: Path) -> None:
    save_file(timm_model(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    assert load(tmp_path / "seven.safetensors").vit.arch.num_classes == 7


def test_another_number_of_classes_than_the_file_has_is_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "five.safetensors")
    with pytest.raises(WeightsError, match=r"head of 5 classes.*asked for 6.*--num-classes 5"):
        load(tmp_path / "five.safetensors", num_classes=6)


def test_another_image_size_needs_to_be_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match=r"image size.*5 entries, the model's 101.*--img-size"):
        load(tmp_path / "small.safetensors", img_size=None)


def test_a_named_image_size_resamples_the_position_embedding(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", img_size=48)
    assert loaded.vit.arch.image_size == (48, 48)
    assert loaded.vit.pos_embed.shape == (9, 64)


def test_weights_of_another_architecture_are_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="another architecture than 'vit_tiny_patch16_224'"):
        load_model("vit_tiny_patch16_224", weights=tmp_path / "other.safetensors", img_size=32)


def test_a_missing_tensor_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    rest = {k: v for k, v in state.items() if k != "blocks.3.norm1.weight"}
    save_file(rest, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing, such as 'blocks\.3\.norm1\.weight'"):
        load(tmp_path / "part.safetensors")


def test_an_unknown_tensor_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**state, "blocks.0.extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"1 unknown, such as 'blocks\.0\.extra'"):
        load(tmp_path / "more.safetensors")


def test_a_tensor_of_another_shape_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**state, "norm.weight": torch.ones(65)}, tmp_path / "shape.safetensors")
    with pytest.raises(WeightsError, match=r"'norm\.weight': \[65\] in the file, \[64\]"):
        load(tmp_path / "shape.safetensors")


@writers
def test_weights_that_are_no_numbers_are_refused(
    write: Callable[..., None], state: dict[str, Tensor], tmp_path: Path
) -> None:
    bad = {k: v.clone() for k, v in state.items()}
    bad["blocks.2.mlp.fc1.weight"][3, 4] = float("nan")
    write(bad, tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match=r"blocks\.2\.mlp\.fc1\.weight' holds 1 NaN"):
        load(tmp_path / "weights.bin")


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist or is not a file") as caught:
        load(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match="is empty"):
        load(tmp_path / "empty.pth")


@writers
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    write: Callable[..., None], share: float, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    write(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=r"weights\.bin"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        b"\x00",
        b"PK",
        b"PK\x03\x04 but no archive",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x04\x95",
        b"\xff" * 100,
        b'{"a": 1}',
    ],
)
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.bin"):
        load(tmp_path / "weights.bin")


def small_file(how: str) -> bytes:
    buffer = io.BytesIO()
    tensors = {"head.weight": torch.arange(6.0).reshape(2, 3)}
    if how == "safetensors":
        from safetensors.torch import save

        return save(tensors)
    torch.save({"state_dict": tensors}, buffer, _use_new_zipfile_serialization=how == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
@settings(deadline=None, derandomize=True, max_examples=80)
@given(data=st.data())
def test_damaged_bytes_give_weights_or_a_weights_error(
    how: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(small_file(how))
    at = data.draw(st.integers(2, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / f"damaged-{how}.bin"
    path.write_bytes(bytes(content))
    try:
        found = read_weights(path)
    except WeightsError:
        return
    assert all(isinstance(v, Tensor) for v in found.values())


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        {"state_dict": {}},
        [torch.zeros(1)],
        torch.zeros(2),
        "text",
        {"state_dict": {"epoch": 3}},
    ],
    ids=str,
)
def test_a_torch_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="no model weights"):
        load(tmp_path / "weights.pth")


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def code_in_torch(path: Path, code: Code, legacy: bool) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "args": code}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def code_in_pickle(path: Path, code: Code, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"state_dict": code}, protocol=protocol))


CODE: dict[str, Callable[[Path, Code], None]] = {
    "torch file": lambda path, code: code_in_torch(path, code, legacy=False),
    "torch file of the old format": lambda path, code: code_in_torch(path, code, legacy=True),
    **{
        f"pickle of protocol {p}": partial(code_in_pickle, protocol=p)
        for p in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("write", CODE.values(), ids=CODE.keys())
def test_code_in_a_file_is_refused_and_never_run(
    write: Callable[[Path, Code], None], tmp_path: Path
) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    write(path, Code(marker))
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        load(path)
    assert not marker.exists()


def test_the_refusal_of_code_says_what_to_save(tmp_path: Path) -> None:
    code_in_torch(tmp_path / "weights.pth", Code(tmp_path / "marker"), legacy=False)
    with pytest.raises(WeightsError, match=r"never unpickled.*state_dict\(\)"):
        load(tmp_path / "weights.pth")


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"Save model\.state_dict"):
        load(tmp_path / "module.pth")


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
    ("flag", "value"), [("num_classes", -1), ("img_size", 0), ("img_size", -1)]
)
def test_sizes_out_of_their_range_are_refused(flag: str, value: Any, weights_file: Path) -> None:
    with pytest.raises(SettingError, match=f"--{flag.replace('_', '-')} is {value}"):
        load_model("vit_tiny", weights=weights_file, **{flag: value})


def test_an_image_smaller_than_a_patch_is_refused(weights_file: Path) -> None:
    with pytest.raises(UsageError, match=r"--img-size 8.*16"):
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


@pytest.mark.parametrize("flag", ["mean", "std"])
@pytest.mark.parametrize("values", [(0.5,), (0.5,) * 4], ids=len)
def test_another_number_of_values_than_channels_is_refused(flag: str, values: Any) -> None:
    with pytest.raises(SettingError, match=f"3 channels but --{flag} has {len(values)}"):
        load_model(timm_model(), **{flag: values})


@pytest.mark.parametrize("flag", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_mean_and_std_must_be_finite(flag: str, value: float) -> None:
    values: Any = (0.5, 0.5, value)
    with pytest.raises(SettingError, match=f"--{flag}"):
        load_model(timm_model(), **{flag: values})


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_std_must_be_positive(value: float) -> None:
    with pytest.raises(SettingError, match=r"std \(--std\) is .*from 0\.003922 to 1"):
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


def test_no_classes_leave_the_head_of_a_file_out(weights_file: Path) -> None:
    loaded = load_model("vit_tiny_patch16_224", weights=weights_file, img_size=32, num_classes=0)
    assert loaded.vit.arch.num_classes == 0
    assert loaded.vit(torch.zeros(1, 3, 32, 32)).shape == (1, 192)
    assert load_model("demo", num_classes=0).vit.arch.num_classes == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pos_embed", torch.zeros(3)),
        ("pos_embed", torch.zeros(())),
        ("head.weight", torch.zeros(5, 192, dtype=torch.int32)),
        ("head.weight", torch.zeros(5, 192, dtype=torch.complex64)),
        ("head.weight", torch.zeros(0, 192)),
        ("head.weight", torch.zeros(5, 192).to_sparse()),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.dtype} {list(x.shape)} {x.layout}",
)
def test_odd_tensors_are_refused(
    tmp_path: Path, state: dict[str, Tensor], key: str, value: Tensor
) -> None:
    torch.save({**state, key: value}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth"):
        load(tmp_path / "odd.pth")


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("std", [1 / 255, 0.25, 1.0])
def test_every_usual_mean_and_std_is_taken(mean: float, std: float) -> None:
    loaded = load_model(make_vit(), mean=[mean] * 3, std=[std] * 3)
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((mean,) * 3, (std,) * 3)


def test_weights_of_another_patch_size_are_refused_before_they_are_resampled(
    tmp_path: Path,
) -> None:
    model = timm.create_model("test_vit", num_classes=5, patch_size=8, img_size=160)
    save_file(model.state_dict(), tmp_path / "p8.safetensors")
    with pytest.raises(WeightsError, match=r"patches of 8 x 8 pixels, 'test_vit' has 16 x 16"):
        load_model("test_vit", weights=tmp_path / "p8.safetensors", img_size=160)


@torch.no_grad()
def test_published_names_of_layer_scale_are_taken(tmp_path: Path) -> None:
    model: Any = timm.create_model("deit3_small_patch16_224", img_size=32, num_classes=5).eval()
    for block in model.blocks:
        block.ls1.gamma.uniform_(0.5, 1.5)
        block.ls2.gamma.uniform_(0.5, 1.5)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit3.pth")
    found = load_model("deit3_small_patch16_224", weights=tmp_path / "deit3.pth", img_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.vit(images), model(images), rtol=1e-3, atol=1e-3)
