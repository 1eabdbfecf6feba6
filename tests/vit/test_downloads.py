"""Models from the hub: what fails is told apart by where it failed, and other threads go on."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from dfq.errors import (
    DfqError,
    PretrainedError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
)
from dfq.vit import download
from dfq.vit.download import create_model

CONSTANTS = huggingface_hub.constants


@pytest.fixture(autouse=True)
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(CONSTANTS, "HF_HUB_OFFLINE", False)


def raised_in(package: str, error: Exception) -> Any:
    """A function of another package that raises."""
    space: dict[str, Any] = {"__name__": f"{package}.module", "error": error}
    exec("def fail(*_, **__):\n    raise error", space)
    return space["fail"]


CAUSES: dict[str, tuple[str, Exception, bool, type[DfqError]]] = {
    "no connection": ("urllib", OSError("unreachable"), True, PretrainedError),
    "a client of any name": ("anyhttp", ValueError("closed"), True, PretrainedError),
    "torch has other sizes": (
        "torch",
        RuntimeError("Fehler beim Laden:\n\tsize mismatch for head"),
        True,
        WeightsError,
    ),
    "timm has no such keyword": ("timm", TypeError("unexpected"), True, UnsupportedModelError),
    "timm asserts": ("timm", AssertionError("bad"), False, UnsupportedModelError),
    "torch has no such shape": ("torch", RuntimeError("negative"), False, UnsupportedModelError),
}


@pytest.mark.parametrize(
    ("package", "error", "pretrained", "expected"), CAUSES.values(), ids=CAUSES.keys()
)
def test_causes_are_told_apart_by_what_raised(
    package: str,
    error: Exception,
    pretrained: bool,
    expected: type[DfqError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timm, "create_model", raised_in(package, error))
    with pytest.raises(expected, match="'test_vit'") as caught:
        create_model("test_vit", pretrained=pretrained)
    assert str(error).splitlines()[-1].strip() in str(caught.value)


def test_running_out_of_memory_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", raised_in("torch", MemoryError()))
    with pytest.raises(MemoryError):
        create_model("test_vit", pretrained=True)


def test_real_weights_of_another_shape_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> nn.Module:
        model = nn.Linear(2, 2)
        model.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
        return model

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(WeightsError, match="size mismatch for weight"):
        create_model("test_vit", pretrained=True)


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_a_description_on_the_hub_is_checked_as_one_in_a_folder(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []
    config = {"architecture": "test_vit", "pretrained_cfg": {"interpolation": "area"}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def fetch(repository: str, filename: str, revision: str | None) -> str:
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    for address, revision in (("a/b", None), ("a/b@v1", "v1")):
        with pytest.raises(UnknownModelError, match=r"interpolation in its config\.json is 'area'"):
            create_model(f"{prefix}{address}")
        assert asked.pop() == ("a/b", "config.json", revision)


def test_the_offline_mode_of_the_hub_lasts_while_any_thread_needs_it() -> None:
    def inside(entered: threading.Event, leave: threading.Event) -> None:
        with download._fail_fast_offline():
            entered.set()
            leave.wait(10)

    events = [(threading.Event(), threading.Event()) for _ in range(2)]
    threads = [threading.Thread(target=inside, args=pair) for pair in events]
    for thread, (entered, _) in zip(threads, events, strict=True):
        thread.start()
        assert entered.wait(10)
    assert CONSTANTS.HF_HUB_OFFLINE
    for index, (thread, (_, leave)) in enumerate(zip(threads, events, strict=True)):
        leave.set()
        thread.join(10)
        assert bool(CONSTANTS.HF_HUB_OFFLINE) is (index == 0)


def test_an_offline_mode_of_the_callers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONSTANTS, "HF_HUB_OFFLINE", True)
    with download._fail_fast_offline():
        assert CONSTANTS.HF_HUB_OFFLINE
    assert CONSTANTS.HF_HUB_OFFLINE
