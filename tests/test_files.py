"""Files and directories appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_files import NO_SPACE, failing
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import tree

from dfq.errors import OutputError
from dfq.files import TEMPORARY, host_name, make_directory, write_bytes, write_json


@settings(deadline=None, max_examples=30, derandomize=True)
@given(before=st.none() | st.binary(), content=st.binary())
def test_written_bytes_replace_what_was_there(before: bytes | None, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "file"
        if before is not None:
            path.write_bytes(before)
        write_bytes(path, content)
        assert tree(Path(place)) == {"file": content}


@pytest.mark.usefixtures("umask")
def test_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.usefixtures("umask")
def test_writing_leaves_the_umask_as_it_is(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"")
    assert os.umask(0o027) == 0o027


def test_file_is_flushed_to_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            calls.append(name)
            call(*args)

        return run

    monkeypatch.setattr(os, "fsync", noted("flush", os.fsync))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace))
    write_bytes(tmp_path / "file", b"content")
    assert calls == ["flush", "rename"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, failing(NO_SPACE))
    with pytest.raises(OutputError, match="No space left"):
        write_bytes(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_place_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(tempfile, "mkstemp", failing(denied))
    with pytest.raises(OutputError, match=r"'.*file'.*Permission denied"):
        write_bytes(tmp_path / "file", b"new")


@pytest.mark.parametrize("place", ["missing/file", "plain/file"])
def test_file_below_something_that_is_no_directory_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "plain").write_bytes(b"plain")
    with pytest.raises(OutputError, match="Cannot write"):
        write_bytes(tmp_path / place, b"new")
    assert tree(tmp_path) == {"plain": b"plain"}


def test_file_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OutputError, match="Cannot write"):
        write_bytes(tmp_path / "file", b"new")
    assert tree(tmp_path) == {"file": None}


def test_unfinished_file_names_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(os, "replace", lambda source, _: names.append(Path(source).name))
    write_bytes(tmp_path / "a.b", b"content")
    match = TEMPORARY.fullmatch(names[0])
    assert match
    assert match.groupdict() == {"name": "a.b", "host": host_name(), "pid": str(os.getpid())}


def test_json_is_written_indented_sorted_and_ascii(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": [1], "a": "ü"})
    expected = b'{\n  "a": "\\u00fc",\n  "b": [\n    1\n  ]\n}\n'
    assert (tmp_path / "file").read_bytes() == expected


def test_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"a": 1, "b": object()})
    assert tree(tmp_path) == {"file": b"old"}


def test_json_reads_back(tmp_path: Path) -> None:
    value = {"text": "\N{SNOWMAN}", "number": 0.1, "none": None, "nested": {"list": [1, 2.5, True]}}
    write_json(tmp_path / "file", value)
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == value


def test_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_directory_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    make_directory(tmp_path)
    assert tree(tmp_path) == {"file": b"kept"}


def test_directory_where_a_file_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is a file"):
        make_directory(tmp_path / "file")


def test_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Cannot write"):
        make_directory(tmp_path / "file" / "below")
