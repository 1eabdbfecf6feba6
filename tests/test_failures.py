"""Conversion of exceptions of other libraries; out-of-memory and dfq's own errors are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from PIL import Image

import dfq
from dfq.data.images import open_images
from dfq.errors import DataError, DfqError, GateError
from dfq.failures import explained, first_line
from dfq.vit import Preprocessing
from dfq.vit.convert import describe
from dfq.vit.load import load_model

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"
FULL = [MemoryError(), RuntimeError(ALLOCATOR), torch.OutOfMemoryError("CUDA out of memory")]


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError("x")], ids=repr)
def test_other_errors_are_explained(error: Exception) -> None:
    with (
        pytest.raises(DataError, match=r"read: '?x'?\.") as caught,
        explained(lambda e: DataError(f"read: {e}.")),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [*FULL, GateError("g"), KeyboardInterrupt()], ids=repr)
def test_full_memory_own_errors_and_interrupts_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explained(lambda _: DataError("x")):
        raise error
    assert caught.value is error


def test_the_first_line_of_an_error_is_short_and_never_empty() -> None:
    assert first_line(ValueError("\n  a \nb")) == "a"
    assert first_line(ValueError("x" * 1000)) == "x" * 200
    assert first_line(MemoryError()) == "MemoryError"


# ---- where it is used


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def open_file(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    Image.new("RGB", (16, 16)).save(root / "x.png")
    arch = describe(make_vit(), "tiny")
    source = open_images(root, arch, Preprocessing((0.5,) * 3, (0.5,) * 3), labeled=False)
    monkeypatch.setattr(Image.Image, "convert", raising(error))
    source.pixels(0)


def open_array(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    np.savez(root / "x.npz", x=np.zeros((1, 16, 16, 3), np.uint8))
    arch = describe(make_vit(), "tiny")
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", raising(error))
    open_images(root / "x.npz", arch, Preprocessing((0.5,) * 3, (0.5,) * 3), labeled=False)


def copy_model(_: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("dfq.vit.structure.copy.deepcopy", raising(error))
    load_model(make_vit())


def run_model(_: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("dfq.vit.convert._intermediate_outputs", raising(error))
    load_model(make_vit())


def read_torch(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    torch.save({}, root / "x.pth")
    monkeypatch.setattr(torch, "load", raising(error))
    load_model("test_vit", weights=root / "x.pth")


def fit_weights(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), root / "x.pth")
    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_filter_fn", raising(error))
    load_model("test_vit", weights=root / "x.pth")


USES = {
    "an image file": (open_file, "cannot be read as an image: odd"),
    "an array": (open_array, "cannot be read as .npz: odd"),
    "a copy": (copy_model, r"it cannot be copied \(odd\)"),
    "a forward pass": (run_model, "its forward fails: odd"),
    "a torch file": (read_torch, r"is not a whole torch file \(odd\)"),
    "weights of another form": (fit_weights, "does not fit 'test_vit': odd"),
}


@pytest.mark.parametrize(("use", "message"), USES.values(), ids=USES.keys())
def test_what_fails_is_named(
    use: Callable[..., None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DfqError, match=message):
        use(tmp_path, monkeypatch, ValueError("odd"))


@pytest.mark.parametrize("error", FULL, ids=repr)
@pytest.mark.parametrize(("use", "_"), USES.values(), ids=USES.keys())
def test_full_memory_is_no_fault_of_what_was_given(
    use: Callable[..., None],
    _: str,
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(type(error)) as caught:
        use(tmp_path, monkeypatch, error)
    assert caught.value is error


# ---- channels


def test_images_that_no_file_has_the_channels_for_are_refused_before_any_work(
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 16, 16, 3), np.uint8))
    model = make_vit(in_chans=2)
    given: dict[str, Any] = {"mean": (0.5,) * 2, "std": (0.5,) * 2, "images": 4}
    given |= {"out": tmp_path / "out", "cache": tmp_path / "cache"}
    for use in ("eval", "calibration"):
        with pytest.raises(DataError, match=r"1, 3 or 4 channels; the model takes 2, so there"):
            dfq.quantize(model, **{**given, use: tmp_path / "x.npz"})
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
