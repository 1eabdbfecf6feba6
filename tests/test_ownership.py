"""What dfq replaces and removes is its own, by type and mark; the rest is the user's."""

from __future__ import annotations

import ast
import errno
import os
import platform
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_files import NO_SPACE, failing
from trees import tree

import dfq
from dfq.errors import OutputError
from dfq.files import host_name
from dfq.ownership import (
    DirectoryFormat,
    FileFormat,
    check_replaceable,
    followed,
    move_files,
    remove_abandoned,
    remove_directory,
    replaced_directory,
    write_file,
)

THING = DirectoryFormat("a thing", re.compile(r"file|config\.json"), "config.json", "thing")
TEXT = FileFormat("a text", lambda path: path.read_bytes().startswith(b"mine"))
PAIR = FileFormat("a pair", lambda path: path.read_bytes().startswith(b"mine"), (".bin",))
NOBODY = 2**22 + 1
"""Number above all that Linux gives to processes."""


def test_replaced_directory_appears_with_its_parents(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "a" / "out", THING) as new:
        (new / "file").write_bytes(b"new")
    assert tree(tmp_path) == {"a": None, "a/out": None, "a/out/file": b"new"}


def test_replaced_directory_is_not_seen_before_the_end(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "out", THING) as new:
        (new / "file").write_bytes(b"new")
        assert not (tmp_path / "out").exists()


def replace_with(path: Path, content: bytes, last: Callable[[], None] = lambda: None) -> None:
    """Replace a directory by one with ``file`` in it; ``last`` is called before the swap."""
    with replaced_directory(path, THING) as new:
        (new / "file").write_bytes(content)
        last()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory of the format, alone in its parent."""
    path = tmp_path / "place" / "out"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"format": "thing"}')
    (path / "file").write_bytes(b"old")
    return path


def test_replaced_directory_keeps_nothing_of_the_old(out: Path) -> None:
    replace_with(out, b"new")
    assert tree(out.parent) == {"out": None, "out/file": b"new"}


@pytest.mark.usefixtures("umask")
def test_replaced_directory_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "out", THING):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong")])
def test_failing_block_leaves_the_old_directory_and_nothing_else(
    out: Path, error: BaseException
) -> None:
    before = tree(out.parent)
    with pytest.raises(type(error)):
        replace_with(out, b"new", failing(error))
    assert tree(out.parent) == before


def test_failing_block_leaves_no_directory_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), replaced_directory(tmp_path / "out", THING):
        raise ValueError("wrong")
    assert tree(tmp_path) == {}


def test_full_disk_inside_the_block_is_an_output_error(out: Path) -> None:
    before = tree(out.parent)
    with pytest.raises(OutputError, match="No space left"), replaced_directory(out, THING):
        raise NO_SPACE
    assert tree(out.parent) == before


@pytest.mark.parametrize("step", [1, 2])
def test_failing_swap_leaves_the_old_directory_and_nothing_else(
    out: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The old directory moves out of the way, then the new one takes its place."""
    before, renames, replace = tree(out.parent), 0, os.replace

    def fail_at_step(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == step:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with pytest.raises(OutputError, match="Input/output"):
        replace_with(out, b"new", lambda: monkeypatch.setattr(os, "replace", fail_at_step))
    assert tree(out.parent) == before


def test_failing_rename_of_a_first_directory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError), replaced_directory(tmp_path / "out", THING):
        monkeypatch.setattr(os, "replace", failing(NO_SPACE))
    assert tree(tmp_path) == {}


def test_directory_that_cannot_be_removed_does_not_undo_the_swap(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_with(out, b"new", lambda: monkeypatch.setattr(Path, "unlink", failing(NO_SPACE)))
    assert tree(out) == {"file": b"new"}


def test_directory_that_a_block_cannot_begin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(OutputError, match="is a file"),
        replaced_directory(tmp_path / "file" / "out", THING),
    ):
        pytest.fail("the block was entered")


def test_working_directory_is_replaced_whole_or_not_at_all(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``.`` may not be renamable; whatever happens, nothing else is left in either place."""
    monkeypatch.chdir(out)
    expected = tree(out.parent)
    try:
        replace_with(Path("."), b"new")
    except OutputError:
        pass
    else:
        expected = {"out": None, "out/file": b"new"}
    assert tree(out.parent) == expected


# ---- directories of the user


def hold_a_directory(out: Path) -> None:
    (out / "file").unlink()
    (out / "file").mkdir()
    (out / "file" / "notes.txt").write_text("precious")


def hold_a_link(out: Path) -> None:
    (out.parent / "elsewhere").write_text("precious")
    (out / "file").unlink()
    (out / "file").symlink_to(out.parent / "elsewhere")


def hold_another_name(out: Path) -> None:
    (out / "notes.txt").write_text("precious")


def hold_hidden_temporaries(out: Path) -> None:
    (out / ".notes.tmp").write_text("precious")


def hold_anothers_temporary(out: Path) -> None:
    (out / f".notes.{host_name()}-{NOBODY}.abcdefgh.tmp").write_text("precious")


HOLDS = [
    hold_a_directory,
    hold_a_link,
    hold_another_name,
    hold_hidden_temporaries,
    hold_anothers_temporary,
]


@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_not_dfqs_by_name_and_type_is_not_replaced(
    out: Path, hold: Callable[[Path], None]
) -> None:
    hold(out)
    before = tree(out.parent)
    for act in (lambda: check_replaceable(out, THING), lambda: remove_directory(out, THING)):
        with pytest.raises(OutputError, match=r"also holds '.*would be lost.*not|Nothing"):
            act()
    with pytest.raises(OutputError, match="would be lost"):
        replace_with(out, b"new")
    assert tree(out.parent) == before


@pytest.mark.parametrize("hold", HOLDS)
def test_what_appears_during_the_work_is_not_replaced(
    out: Path, hold: Callable[[Path], None]
) -> None:
    with pytest.raises(OutputError, match="would be lost"):
        replace_with(out, b"new", lambda: hold(out))
    assert (out / "config.json").is_file()
    assert [p.name for p in out.parent.iterdir() if p.name != "elsewhere"] == ["out"]


def test_directory_that_loses_its_mark_during_the_work_is_not_replaced(out: Path) -> None:
    with pytest.raises(OutputError, match="something other than a thing"):
        replace_with(out, b"new", (out / "config.json").unlink)
    assert tree(out) == {"file": b"old"}


def test_unfinished_files_of_the_format_go_with_it(out: Path) -> None:
    (out / f".file.{host_name()}-{NOBODY}.abcdefgh.tmp").write_bytes(b"half")
    replace_with(out, b"new")
    assert tree(out.parent) == {"out": None, "out/file": b"new"}


def test_link_to_a_directory_is_followed(out: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(out)
    replace_with(link, b"new")
    assert link.is_symlink()
    assert tree(out) == {"file": b"new"}


def test_removing_a_directory_removes_all_of_it(out: Path) -> None:
    remove_directory(out, THING)
    assert tree(out.parent) == {}


def test_removing_a_link_keeps_its_target(out: Path, tmp_path: Path) -> None:
    before = tree(out)
    (tmp_path / "link").symlink_to(out)
    remove_directory(tmp_path / "link", THING)
    assert not (tmp_path / "link").is_symlink()
    assert tree(out) == before


# ---- unfinished files


@pytest.mark.parametrize(
    "name",
    [
        ".notes.tmp",
        ".cache.tmp",
        f".notes.HOST-{NOBODY}.abcdefgh.tmp",
        f".file.HOST-{NOBODY}.abc.tmp",
        f"file.HOST-{NOBODY}.abcdefgh.tmp",
        f".file.another-{NOBODY}.abcdefgh.tmp",
        ".file.HOST-0.abcdefgh.tmp",
        ".file.HOST-PID.abcdefgh.tmp",
        ".file.HOST-99999999999999999999.abcdefgh.tmp",
    ],
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_other_hidden_files_are_kept(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name.replace("HOST", host_name()).replace("PID", str(os.getpid()))
    path.mkdir() if kind == "directory" else path.write_text("mine")
    remove_abandoned(tmp_path, THING)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("pid", [NOBODY, 9_999_999_999])
def test_unfinished_files_of_dead_writers_are_removed(tmp_path: Path, pid: int) -> None:
    name = f".file.{host_name()}-{pid}.abcdefgh.tmp"
    (tmp_path / name).write_bytes(b"half")
    remove_abandoned(tmp_path, THING)
    assert tree(tmp_path) == {}


def test_directory_of_the_name_of_an_unfinished_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / f".file.{host_name()}-{NOBODY}.abcdefgh.tmp").mkdir()
    remove_abandoned(tmp_path, THING)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("node", "host"), [("a.b-c", "a_b_c"), ("", "host"), ("x" * 99, "x" * 32)])
def test_host_is_a_word(monkeypatch: pytest.MonkeyPatch, node: str, host: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: node)
    assert host_name() == host


# ---- files of the user


@pytest.mark.parametrize("content", [b"", b"yours"])
def test_file_of_the_user_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(OutputError, match=r"than a text, .*Nothing there was touched.*remove"):
        write_file(tmp_path / "a.txt", b"mine", TEXT)
    assert tree(tmp_path) == {"a.txt": content}


def test_own_file_is_replaced(tmp_path: Path) -> None:
    for content in (b"mine 1", b"mine 2"):
        write_file(tmp_path / "a.txt", content, TEXT)
    assert tree(tmp_path) == {"a.txt": b"mine 2"}


def test_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        write_file(tmp_path / "a.txt", b"mine", TEXT)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A new pair of files that is to be moved."""
    (tmp_path / "new").mkdir()
    for suffix in (".txt", ".bin"):
        (tmp_path / "new" / f"a{suffix}").write_bytes(b"mine new")
    return tmp_path / "new" / "a.txt"


@pytest.mark.parametrize("there", [(".txt", ".bin"), (".txt",), ()])
def test_pair_replaces_what_is_there_of_a_pair(
    tmp_path: Path, pair: Path, there: tuple[str, ...]
) -> None:
    for suffix in there:
        (tmp_path / f"a{suffix}").write_bytes(b"mine old")
    move_files(pair, tmp_path / "a.txt", PAIR)
    assert tree(tmp_path) == {"new": None, "a.txt": b"mine new", "a.bin": b"mine new"}


def test_directory_in_the_place_of_a_member_is_refused(tmp_path: Path, pair: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"mine")
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OutputError, match=r"a\.bin' is something other"):
        move_files(pair, tmp_path / "a.txt", PAIR)
    assert (tmp_path / "a.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_pair_that_cannot_be_moved_whole_leaves_the_old_one(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for suffix in (".txt", ".bin"):
        (tmp_path / f"a{suffix}").write_bytes(b"mine old")
    renames, replace = 0, os.replace

    def fail_at_step(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == step:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_step)
    with pytest.raises(OSError, match="Input/output"):
        move_files(pair, tmp_path / "a.txt", PAIR)
    assert tree(tmp_path) == {"new": None, "a.txt": b"mine old", "a.bin": b"mine old"}


# ---- links


def test_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_bytes(b"mine old")
    (tmp_path / "a.txt").symlink_to("target.txt")
    write_file(tmp_path / "a.txt", b"mine", TEXT)
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "target.txt").read_bytes() == b"mine"


def test_links_of_a_pair_are_followed_each(tmp_path: Path, pair: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "target").write_bytes(b"mine old")
    (tmp_path / "a.bin").symlink_to("far/target")
    (tmp_path / "a.txt").write_bytes(b"mine old")
    move_files(pair, tmp_path / "a.txt", PAIR)
    assert (tmp_path / "a.bin").is_symlink()
    assert (tmp_path / "far" / "target").read_bytes() == b"mine new"
    assert list((tmp_path / "far").iterdir()) == [tmp_path / "far" / "target"]


@pytest.mark.parametrize("target", ["missing", "a.txt"], ids=["broken", "loop"])
def test_broken_link_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.txt").symlink_to(target)
    for act in (
        lambda: write_file(tmp_path / "a.txt", b"mine", TEXT),
        lambda: check_replaceable(tmp_path / "a.txt", THING),
        lambda: followed(tmp_path / "a.txt"),
    ):
        with pytest.raises(OutputError, match=r"is a link to|symbolic links"):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# ---- the only door


REMOVING = {"rmtree", "unlink", "rmdir", "remove", "removedirs", "replace", "rename", "move"}
"""Functions of ``os``, ``shutil`` and ``Path`` that remove files or rename them over others."""


def removals(path: Path) -> set[str]:
    """Calls in a module of functions of ``os`` and ``shutil``, or methods of paths, that remove."""
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    methods = [f for f in calls if isinstance(f, ast.Attribute) and f.attr in REMOVING]
    always = {"rmtree", "unlink", "rmdir", "removedirs"}
    return {
        f.attr
        for f in methods
        if f.attr in always or (isinstance(f.value, ast.Name) and f.value.id in ("os", "shutil"))
    }


def test_one_module_removes_files() -> None:
    root = Path(dfq.__file__).parent
    found = {
        p.relative_to(root).as_posix(): calls for p in root.rglob("*.py") if (calls := removals(p))
    }
    assert found.pop("ownership.py") >= {"rmtree", "unlink", "rmdir", "replace", "move"}
    assert found == {"files.py": {"unlink", "replace"}}
