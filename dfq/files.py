"""Atomic writing of files and directories."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dfq.argument_names import option
from dfq.errors import OutputError

_WRITER = re.compile(r"\.(?P<host>[A-Za-z0-9_]+)-(?P<pid>[0-9]+)\.[^.]*\.tmp$")
"""Host and process of the writer, in the name of a temporary file."""


def explain(error: OSError, path: Path) -> OutputError:
    """Convert an OSError of a failed write to an :class:`OutputError` with advice."""
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"No space left on the device while writing {str(path)!r}. Free some, or choose "
            "another place; files that were finished before are kept."
        )
    reason = error.strerror or str(error)
    return OutputError(f"Cannot write {str(path)!r}: {reason}. Choose a place that can be written.")


def remove_abandoned(directory: Path) -> None:
    """Remove temporary files of processes that no longer run; those of other hosts are kept."""
    for path in directory.glob(".*.tmp"):
        writer = _WRITER.search(path.name)
        if writer is None or (writer["host"] == _host() and not _runs(int(writer["pid"]))):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32] or "host"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: write a temporary file, flush it to disk, then rename it.

    Raises:
        OutputError: the path cannot be written, or the disk is full.
    """
    try:
        writer = f"{_host()}-{os.getpid()}"
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.{writer}.", suffix=".tmp", dir=path.parent
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise explain(error, path) from error


def replace_files(moves: dict[Path, Path]) -> None:
    """Rename files to their destinations, all of them or none.

    ``moves`` maps each file to its destination on the same file system; existing destinations are
    replaced.

    Raises:
        OSError: a file could not be moved; the destinations have been restored.
    """
    kept: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for new, place in moves.items():
            if place.exists():
                kept[place] = new.with_name(f"{new.name}.old")
                os.replace(place, kept[place])
            os.replace(new, place)
            done.append(place)
    except BaseException:
        for place in done:
            place.unlink()
        for place, old in kept.items():
            os.replace(old, place)
        raise


def safe_name(name: str) -> str:
    """Make a name safe for file names: other characters than letters, digits, ``._-`` become
    ``-``."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def read_json(path: Path) -> Any:
    """Read a JSON file of finite numbers and valid UTF-8 text.

    Raises:
        ValueError: the content is not such JSON, or the path is not a regular file.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON as :func:`read_json` does; ``pairs`` makes objects of names and values.

    Raises:
        ValueError: the text is not such JSON.
    """
    try:
        value = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=pairs
        )
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys atomically.

    Bytes of file names that are no UTF-8 are written as escapes, such as ``\\udcff``.
    """
    write_bytes(path, (json.dumps(_as_utf8(value), indent=2, sort_keys=True) + "\n").encode())


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_utf8(k): _as_utf8(v) for k, v in value.items()}
    return [_as_utf8(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A name of the file, which exists, for libraries that open UTF-8 names alone."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def make_directory(path: Path) -> None:
    """Create a directory and its parents if they do not exist.

    Raises:
        OutputError: the directory cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{str(path)!r} is a file, not a directory.") from error
    except OSError as error:
        raise explain(error, path) from error


def check_writable(directory: Path) -> None:
    """Create ``directory``; raise :class:`OutputError` if no file can be written in it."""
    make_directory(directory)
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise explain(error, directory) from error


def check_link(path: Path) -> None:
    """Raise :class:`OutputError` if ``path`` is a broken link."""
    if path.is_symlink() and not path.exists():
        raise OutputError(
            f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist. Make that "
            "directory, or name another place."
        )


def check_replaceable(
    path: Path, config: str, format_name: str, what: str, own: Collection[str] | None = None
) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, empty or a directory of a format.

    The directory's file ``config`` is JSON with the field ``format``.  ``what``: description of the
    format for messages.  ``own``: names of all files of the format; a directory with other files is
    not replaced.
    """
    try:
        check_link(path)
        if not path.exists():
            return
    except OSError as error:
        raise explain(error, path) from error
    if not path.is_dir():
        raise OutputError(f"{str(path)!r} is a file; {option('out')} takes a directory.")
    if path.resolve() == Path.cwd():
        raise OutputError(
            f"{option('out')} is the working directory, which cannot be replaced; name a new one."
        )
    names = sorted(p.name for p in path.iterdir())
    if names and not has_format(path / config, format_name):
        raise OutputError(
            f"{str(path)!r} holds something other than {what}. Nothing there was touched; "
            f"choose another {option('out')} or remove it."
        )
    others = [name for name in names if own is not None and name not in own]
    if others:
        raise OutputError(
            f"{str(path)!r} is {what}, but also holds {others[0]!r}, which replacing it would "
            f"lose. Nothing there was touched; move that away or choose another {option('out')}."
        )


def has_format(config: Path, format_name: str) -> bool:
    """Whether a file is JSON whose field ``format`` is ``format_name``."""
    try:
        content = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == format_name


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory that replaces ``path`` if the block succeeds.

    If the block fails, ``path`` is unchanged and the new directory is removed.  The caller checks
    that ``path`` may be replaced.  If ``path`` is a link, its target is replaced.
    """
    path = path.resolve() if path.is_symlink() else path
    make_directory(path.parent)
    try:
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        new.chmod(0o777 & ~_umask())
    except OSError as error:
        raise explain(error, path) from error
    try:
        yield new
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            try:
                os.replace(path, old / path.name)
                try:
                    os.replace(new, path)
                except BaseException:
                    os.replace(old / path.name, path)
                    raise
            except BaseException:
                os.rmdir(old)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(new, path)
    except OutputError as error:
        raise OutputError(str(error).replace(str(new), str(path))) from error
    except OSError as error:
        raise explain(error, path) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
