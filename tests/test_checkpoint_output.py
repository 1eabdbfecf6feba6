"""The directory that a checkpoint is written to."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from saved_checkpoints import change_config, save
from trees import tree

from dfq.checkpoint import check_output
from dfq.errors import OutputError
from dfq.quantization import QuantizedViT


def test_new_place_is_free(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "out")
    assert tree(tmp_path) == {}


def test_empty_directory_is_free(tmp_path: Path, w4a8_model: QuantizedViT) -> None:
    save(tmp_path, w4a8_model)
    assert (tmp_path / "config.json").is_file()


def test_checkpoint_is_replaced_whole(
    w4a8: Path, w4a8_model: QuantizedViT, w4a8_saved: Path
) -> None:
    change_config(w4a8, lambda c: c.update(format_version=99))
    (w4a8 / "model.safetensors").write_bytes(b"")
    (w4a8 / "report.json").write_text("{}")
    save(w4a8, w4a8_model)
    assert tree(w4a8) == tree(w4a8_saved)
    assert [p.name for p in w4a8.parent.iterdir()] == ["checkpoint"]


def test_file_is_refused(tmp_path: Path, w4a8_model: QuantizedViT) -> None:
    (tmp_path / "out").write_bytes(b"kept")
    with pytest.raises(OutputError, match="is a file"):
        save(tmp_path / "out", w4a8_model)
    assert tree(tmp_path) == {"out": b"kept"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b'{"format": "dfq-sparse-images"}',
        b'"dfq-checkpoint"',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=["none", "empty", "array", "object", "dataset", "string", "binary", "deep"],
)
def test_foreign_directory_is_refused_and_left_as_it_is(
    tmp_path: Path, w4a8_model: QuantizedViT, content: bytes | None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"kept")
    if content is not None:
        (tmp_path / "out" / "config.json").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="something other than a dfq checkpoint"):
        save(tmp_path / "out", w4a8_model)
    assert tree(tmp_path) == before


def test_place_below_a_file_is_refused(tmp_path: Path, w4a8_model: QuantizedViT) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "out", w4a8_model)
    assert tree(tmp_path) == {"file": b"kept"}


def test_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize("place", ["free", "checkpoint"])
def test_full_disk_leaves_what_was_there(
    w4a8: Path, w4a8_model: QuantizedViT, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before, fsync, files = tree(w4a8.parent), os.fsync, 0

    def full_after_two(descriptor: int) -> None:
        nonlocal files
        files += 1
        if files > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_two)
    with pytest.raises(OutputError, match="No space left"):
        save(w4a8.parent / place, w4a8_model)
    assert tree(w4a8.parent) == before


def test_configuration_is_written_last(
    tmp_path: Path, w4a8_model: QuantizedViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save(tmp_path / "out", w4a8_model)
    assert written == ["model.safetensors", "recipe.toml", "config.json", "out"]
