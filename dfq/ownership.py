"""What may be replaced or removed: files and directories that dfq wrote, told by type and mark.

Whatever is not recognized as dfq's is the user's, and refused.  Other modules neither remove files
nor rename them over others; they call these functions.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dfq.argument_names import option
from dfq.errors import OutputError
from dfq.files import (
    TEMPORARY,
    check_writable,
    current_umask,
    explain,
    host_name,
    make_directory,
    read_json,
    write_bytes,
)


@dataclass(frozen=True)
class DirectoryFormat:
    """Directories of one format.

    ``what``: description for messages.  ``names``: pattern of the names of its files, all of them
    regular files directly below it; unfinished ones (:data:`dfq.files.TEMPORARY`) belong to it too.
    ``config``: the file that marks it, JSON with the field ``format``; None of directories in dfq's
    cache, which their place marks.
    """

    what: str
    names: re.Pattern[str]
    config: str | None = None
    format: str = ""

    def marks(self, directory: Path) -> bool:
        """Whether a directory has the mark of the format."""
        return self.config is None or has_format(directory / self.config, self.format)

    def owns(self, path: Path) -> bool:
        """Whether a path directly below such a directory is one of its files, by name and type."""
        unfinished = TEMPORARY.fullmatch(path.name)
        name = unfinished["name"] if unfinished else path.name
        return self.names.fullmatch(name) is not None and _is_regular(path)


@dataclass(frozen=True)
class FileFormat:
    """Files of one format.

    ``what``: description for messages.  ``is_own``: whether the file at a path, with those beside
    it that belong to it, was written by dfq.  ``beside``: suffixes of the files beside it.
    """

    what: str
    is_own: Callable[[Path], bool]
    beside: tuple[str, ...] = ()

    def members(self, path: Path) -> list[Path]:
        """Return the file and those beside it."""
        return [path, *(path.with_suffix(suffix) for suffix in self.beside)]


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def has_format(config: Path, format_name: str) -> bool:
    """Whether a file is JSON whose field ``format`` is ``format_name``."""
    try:
        content = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == format_name


def followed(path: Path) -> Path:
    """Return what ``path`` links to, or ``path`` if it is no link.

    Raises:
        OutputError: it is a broken link.
    """
    try:
        if not path.is_symlink():
            return path
        if not path.exists():
            raise OutputError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist. Make "
                "what it links to, or name another place."
            )
        return path.resolve()
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise explain(reason, path) from error


# ---- files


def check_file(path: Path, format: FileFormat) -> None:
    """Raise :class:`OutputError` unless a file, with those beside it, is free or dfq's."""
    try:
        there = [p for p in map(followed, format.members(path)) if p.exists()]
        if path.is_dir():
            raise OutputError(f"{str(path)!r} is a directory; {option('out')} takes a file.")
        own = not there or (all(map(Path.is_file, there)) and format.is_own(path))
    except OSError as error:
        raise explain(error, path) from error
    if not own:
        names = " or ".join(repr(str(p)) for p in format.members(path))
        raise OutputError(
            f"{names} is something other than {format.what}, or lacks its mark. Nothing there was "
            "touched; choose another name, or remove it."
        )


def check_file_place(path: Path, format: FileFormat) -> None:
    """As :func:`check_file`; also raise if a file cannot be written there."""
    for place in {followed(p).parent for p in format.members(path)}:
        check_writable(place)
    check_file(path, format)


def write_file(path: Path, content: bytes, format: FileFormat) -> None:
    """Write a file atomically; an older one of dfq's is replaced, a link followed.

    Raises:
        OutputError: the path cannot be written, or holds something else.
    """
    check_file(path, format)
    write_bytes(followed(path), content)


def move_files(new: Path, path: Path, format: FileFormat) -> None:
    """Move a file and those beside it from ``new`` to ``path``, all of them or none.

    Older ones of dfq's are replaced, links followed.

    Raises:
        OutputError: the path holds something else.
        OSError: a file could not be moved; what was there has been restored.
    """
    check_file(path, format)
    members = zip(format.members(new), map(followed, format.members(path)), strict=True)
    replace_files(dict(members))


def remove_file(path: Path, format: FileFormat) -> None:
    """Remove a file of dfq's with those beside it; of links, the links.

    Raises:
        OutputError: the path holds something else, or cannot be removed.
    """
    check_file(path, format)
    try:
        for member in format.members(path):
            member.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, path) from error


def replace_files(moves: dict[Path, Path]) -> None:
    """Move files to their destinations, all of them or none.

    ``moves`` maps each file to its destination; existing destinations, which the caller has found
    to be dfq's, are replaced.

    Raises:
        OSError: a file could not be moved; the destinations have been restored.
    """
    kept: dict[Path, Path] = {}
    done: list[Path] = []
    with contextlib.ExitStack() as stack:
        staged = {place: _staged(new, place, stack) for new, place in moves.items()}
        try:
            for place, new in staged.items():
                if place.exists():
                    kept[place] = new.with_name(f"{new.name}.old")
                    os.replace(place, kept[place])
                os.replace(new, place)
                done.append(place)
        except BaseException:
            for place in done:
                place.unlink()
            for place, old in kept.items():
                if old.exists():
                    os.replace(old, place)
            raise


def _staged(new: Path, place: Path, stack: contextlib.ExitStack) -> Path:
    """Move a file into a temporary directory on the file system of its destination."""
    directory = tempfile.TemporaryDirectory(prefix=".dfq-", dir=place.parent)
    return Path(shutil.move(new, Path(stack.enter_context(directory)) / place.name))


# ---- directories


def foreign_names(path: Path, format: DirectoryFormat) -> list[str]:
    """Return the names below a directory that are not those of files of the format."""
    return sorted(p.name for p in path.iterdir() if not format.owns(p))


def check_replaceable(path: Path, format: DirectoryFormat) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, empty, or holds files of a format alone.

    A link is followed.
    """
    try:
        place = followed(path)
        if not place.exists():
            return
        if not place.is_dir():
            raise OutputError(f"{str(path)!r} is a file; {option('out')} takes a directory.")
        if place.resolve() == Path.cwd():
            raise OutputError(
                f"{option('out')} is the working directory, which cannot be replaced; name a new "
                "one."
            )
        if any(place.iterdir()) and not format.marks(place):
            raise OutputError(
                f"{str(path)!r} holds something other than {format.what}. Nothing there was "
                f"touched; choose another {option('out')} or remove it."
            )
        _refuse_foreign(place, path, format)
    except OSError as error:
        raise explain(error, path) from error


def _refuse_foreign(place: Path, path: Path, format: DirectoryFormat) -> None:
    foreign = foreign_names(place, format)
    if foreign:
        raise OutputError(
            f"{str(path)!r} is {format.what}, but also holds {foreign[0]!r}, which would be lost. "
            f"Nothing there was touched; move that away or name another place."
        )


@contextlib.contextmanager
def replaced_directory(path: Path, format: DirectoryFormat) -> Iterator[Path]:
    """Yield a new directory that replaces ``path`` if the block succeeds.

    If the block fails, ``path`` is unchanged and the new directory is removed.  If ``path`` is a
    link, its target is replaced.

    Raises:
        OutputError: the place cannot be written, or holds something other than the format's files,
            before the block or after it.
    """
    check_replaceable(path, format)
    path = followed(path)
    make_directory(path.parent)
    try:
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        new.chmod(0o777 & ~current_umask())
    except OSError as error:
        raise explain(error, path) from error
    try:
        yield new
        if path.exists():
            _swap(new, path, format)
        else:
            os.replace(new, path)
    except OutputError as error:
        raise OutputError(str(error).replace(str(new), str(path))) from error
    except OSError as error:
        raise explain(error, path) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, path: Path, format: DirectoryFormat) -> None:
    """Put ``new`` in the place of the directory ``path``, and remove what was there."""
    check_replaceable(path, format)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = aside / path.name
    try:
        os.replace(path, old)
        try:
            _refuse_foreign(old, path, format)
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
    except BaseException:
        os.rmdir(aside)
        raise
    with contextlib.suppress(OSError):
        _remove_owned(old, format)
        os.rmdir(aside)


def check_removable(path: Path, format: DirectoryFormat) -> None:
    """Raise :class:`OutputError` if a directory holds anything but files of the format.

    The caller has told by its mark that it is dfq's.  A link to a directory is removable; its
    target is kept.
    """
    try:
        if not path.is_symlink():
            _refuse_foreign(path, path, format)
    except OSError as error:
        raise explain(error, path) from error


def remove_directory(path: Path, format: DirectoryFormat) -> None:
    """Remove a directory of dfq's, or a link to one.

    Raises:
        OutputError: it holds other files, or cannot be removed.
    """
    check_removable(path, format)
    try:
        if path.is_symlink():
            path.unlink()
        else:
            _remove_owned(path, format)
    except OSError as error:
        raise explain(error, path) from error


def _remove_owned(path: Path, format: DirectoryFormat) -> None:
    """Remove the files of a format and then the directory, which fails if anything is left."""
    for file in path.iterdir():
        if format.owns(file):
            file.unlink()
    path.rmdir()


def remove_abandoned(directory: Path, format: DirectoryFormat) -> None:
    """Remove unfinished files of processes that no longer run; those of other hosts are kept."""
    for path in directory.iterdir():
        unfinished = TEMPORARY.fullmatch(path.name)
        if unfinished and format.owns(path) and _is_abandoned(unfinished):
            path.unlink(missing_ok=True)


def _is_abandoned(unfinished: re.Match[str]) -> bool:
    return unfinished["host"] == host_name() and not _runs(int(unfinished["pid"]))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True
