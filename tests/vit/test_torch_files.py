"""Files are told apart by their content, and reading one leaves other threads' torch alone."""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dfq.errors import WeightsError
from dfq.vit.weights import read_weights

# ---- formats


def safetensors_with_header(length: int) -> bytes:
    """A file whose header is filled with spaces up to a length, as is allowed."""
    content = save({"a": torch.ones(2)})
    own = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + own])).encode().ljust(length)
    return length.to_bytes(8, "little") + header + content[8 + own :]


SIGNATURES = {
    "pickle": b"\x80\x02",
    "pickle of protocol 4": b"\x80\x04",
    "zip": b"PK",
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "ONNX": bytes((8, 7, 18)),
}


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_header_whose_length_looks_like_another_format_is_read(
    signature: bytes, tmp_path: Path
) -> None:
    content = safetensors_with_header(int.from_bytes(signature, "little"))
    assert content.startswith(signature)
    assert list(load(content)) == ["a"]
    (tmp_path / "w.bin").write_bytes(content)
    assert torch.equal(read_weights(tmp_path / "w.bin")["a"], torch.ones(2))


# ---- the process


@pytest.fixture
def with_objects(tmp_path: Path) -> Path:
    content = {"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_a_plain_file_is_read_with_what_torch_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    allowed, read = [], torch.load

    def watched(*args: Any, **options: Any) -> Any:
        allowed.append(set(torch.serialization.get_safe_globals()))
        return read(*args, **options)

    before = set(torch.serialization.get_safe_globals())
    monkeypatch.setattr(torch, "load", watched)
    read_weights(tmp_path / "w.pth")
    assert allowed == [before]


def test_what_torch_allows_is_as_it_was_afterwards(with_objects: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    assert list(read_weights(with_objects)) == ["a"]
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(with_objects, weights_only=True)


def test_threads_do_not_take_the_substitutes_from_each_other(
    with_objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = set(torch.serialization.get_safe_globals()), torch.load
    delays = {f"reader{index}": 0.03 * index for index in range(4)}

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(delays[threading.current_thread().name])
        return read(*args, **options)

    found: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "load", slow)
    threads = [
        threading.Thread(target=lambda: found.append(read_weights(with_objects)), name=name)
        for name in delays
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [list(state) for state in found] == [["a"]] * 4
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_error_of_a_file_with_code_names_it(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "f": torch.nn.Linear}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds more than weights \(torch\.nn\.modules"):
        read_weights(tmp_path / "w.pth")
