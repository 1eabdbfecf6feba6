"""Which tensors of a file are the model's, and under which names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from malformed_json import MALFORMED
from people_weights import State, assert_same, load, timm_model
from safetensors.torch import save_file
from torch import Tensor

from dfq.errors import UsageError, WeightsError
from dfq.vit.load import load_model
from dfq.vit.weights import read_weights

# ---- sharded weights


def sharded(
    folder: Path, files: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None
) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    named = {key: name for name, tensors in files.items() for key in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": named if weight_map is None else weight_map}))
    return index


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    files = {
        "a.safetensors": {"x": torch.ones(2), "y": torch.ones(2)},
        "b.safetensors": {"x": torch.zeros(2), "z": torch.zeros(2)},
    }
    names = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    found = read_weights(sharded(tmp_path, files, names))
    assert {key: value.tolist() for key, value in found.items()} == {
        "x": [1, 1],
        "y": [1, 1],
        "z": [0, 0],
    }


def test_tensors_that_the_index_does_not_name_are_not_loaded(tmp_path: Path) -> None:
    files = {"a.safetensors": {"x": torch.ones(2), "old": torch.ones(2)}}
    assert list(read_weights(sharded(tmp_path, files, {"x": "a.safetensors"}))) == ["x"]


def test_a_tensor_in_another_file_than_the_index_says_is_missing(tmp_path: Path) -> None:
    files = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}}
    index = sharded(tmp_path, files, {"x": "b.safetensors", "y": "b.safetensors"})
    with pytest.raises(WeightsError, match=r"b\.safetensors' lacks 1 tensors.*such as 'x'"):
        read_weights(index)


@pytest.mark.parametrize("content", [v for v in MALFORMED.values() if v], ids=lambda v: repr(v[:9]))
def test_a_damaged_index_is_no_index(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.index.json").write_bytes(content)
    with pytest.raises(WeightsError, match="no index of sharded weights"):
        read_weights(tmp_path / "d.index.json")


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_folder_with_a_damaged_description_is_no_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match="does not exist or is not a file"):
        read_weights(tmp_path)


LONG = "x" * 5000
LONG_PATH = "x/" * 5000


def test_a_name_too_long_for_a_file_is_of_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"one of the 1 files .* is missing"):
        read_weights(sharded(tmp_path, {}, {"x": LONG}))
    with pytest.raises(WeightsError, match="does not exist or is not a file"):
        read_weights(tmp_path / LONG)


@pytest.mark.parametrize("name", [LONG_PATH, f"local-dir:{LONG_PATH}"], ids=["name", "folder"])
def test_a_path_too_long_names_no_model(name: str) -> None:
    with pytest.raises(UsageError, match=r"at most|dfq models|names no folder"):
        load_model(name)


# ---- two tensors of one name

COLLIDING: dict[str, tuple[Callable[[State], Any], str]] = {
    "compiled beside plain": (
        lambda s: {**s, "blocks._orig_mod.0.norm1.bias": torch.ones(48)},
        r"'blocks\.0\.norm1\.bias' and 'blocks\._orig_mod\.0\.norm1\.bias'",
    ),
    "names that are numbers": (lambda s: {**s, 1: torch.ones(1), "1": torch.ones(1)}, "'1': "),
    "a dict beside a name with dots": (
        lambda s: {
            "blocks": {"0.norm1.bias": torch.ones(48)},
            "blocks.0": {"norm1.bias": s["norm.bias"]},
        },
        r"two tensors for 'blocks\.0\.norm1\.bias'",
    ),
}


@pytest.mark.parametrize(("made", "message"), COLLIDING.values(), ids=COLLIDING.keys())
def test_two_tensors_of_one_name_are_refused(
    made: Callable[[State], Any], message: str, timm_state: State, tmp_path: Path
) -> None:
    torch.save(made(timm_state), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"has two tensors for .*{message}|{message}"):
        load(tmp_path / "w.pth")


def test_the_names_of_wrappers_end_where_a_part_ends(timm_state: State, tmp_path: Path) -> None:
    torch.save({**timm_state, "my_orig_mod.head.weight": torch.ones(5, 48)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"unknown, such as 'my_orig_mod\.head\.weight'"):
        load(tmp_path / "w.pth")


def test_a_projection_beside_a_head_of_the_trunk_is_refused(tmp_path: Path) -> None:
    name = "vit_base_patch16_clip_224"
    state = timm_model(name, num_classes=7).state_dict()
    trunk = {f"visual.trunk.{key}": value for key, value in state.items()}
    torch.save({**trunk, "visual.head.proj.weight": state["head.weight"]}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"two heads.*num_classes=0"):
        load(tmp_path / "w.pth", name)


# ---- the state dict of a training checkpoint


def cyclic(state: State | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content if state is None else {"state_dict": content, "model": state}


def nested(state: State, depth: int = 5000) -> dict[str, Any]:
    content: dict[str, Any] = state
    for _ in range(depth):
        content = {"model": content}
    return content


HIDDEN: dict[str, Callable[[State], Any]] = {
    "an empty averaged dict": lambda s: {"model_ema": {}, "state_dict": s},
    "settings of averaging": lambda s: {"state_dict_ema": {"decay": 0.99}, "state_dict": s},
    "a tensor of averaging": lambda s: {"model_ema": {"decay": torch.tensor(0.9)}, "model": s},
    "settings beside the weights": lambda s: {"model": {"depth": 1}, **s},
    "an averaged dict without weights in it": lambda s: {"model_ema": {"module": {}}, "module": s},
    "a count beside models": lambda s: {"epoch": torch.tensor(3), "net": s},
    "a dict that holds itself": cyclic,
}


@pytest.mark.parametrize("made", HIDDEN.values(), ids=HIDDEN.keys())
def test_the_first_dict_that_holds_weights_is_read(
    made: Callable[[State], Any], timm_vit: Any, timm_state: State, tmp_path: Path
) -> None:
    torch.save(made(timm_state), tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth"), timm_vit)


def test_a_dict_of_nothing_but_itself_holds_no_weights(tmp_path: Path) -> None:
    torch.save(cyclic(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"no model weights \(it has \['state_dict'\]\)"):
        read_weights(tmp_path / "w.pth")


def test_a_deeply_nested_checkpoint_is_read() -> None:
    from dfq.vit.weights import _dicts, _weights

    found = next(
        filter(None, (_weights(d, Path("w")) for d in _dicts(nested({"a": torch.ones(1)}))))
    )
    assert list(found) == ["a"]


def test_a_checkpoint_of_counts_alone_holds_no_weights(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": torch.tensor(3)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no model weights"):
        read_weights(tmp_path / "w.pth")
