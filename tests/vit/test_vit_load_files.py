"""Files of weights: those that load, and those that are refused."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from vit_weights import NAME, timm_model

from dfq.errors import WeightsError
from dfq.vit.load import LoadedModel, fingerprint, load_model
from dfq.vit.weights import read_weights


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return timm_model().state_dict()


def load(path: Path, **changes: Any) -> LoadedModel:
    return load_model(NAME, weights=path, **{"img_size": 32, **changes})


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
    loaded = load(tmp_path / "weights.bin", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert fingerprint(loaded.vit, expected.preprocessing) == expected.fingerprint


def test_half_precision_files_are_computed_in_float32(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    loaded = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.vit.parameters()} == {torch.float32}
    actual = loaded.vit.get_parameter("head.weight")
    assert torch.equal(actual, state["head.weight"].half().float())


def test_the_number_of_classes_is_told_from_the_file(tmp_path: Path) -> None:
    save_file(timm_model(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    assert load(tmp_path / "seven.safetensors").vit.arch.num_classes == 7


def test_another_number_of_classes_than_the_file_has_is_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "five.safetensors")
    with pytest.raises(WeightsError, match=r"head of 5 classes.*asked for 6.*num_classes=5"):
        load(tmp_path / "five.safetensors", num_classes=6)


def test_another_image_size_needs_to_be_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match=r"image size.*5 entries, the model's 101.*img_size="):
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
        state = read_weights(path)
    except WeightsError:
        return
    assert all(isinstance(v, Tensor) for v in state.values())


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
    actual = load_model("deit3_small_patch16_224", weights=tmp_path / "deit3.pth", img_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(actual.vit(images), model(images), rtol=1e-3, atol=1e-3)
