"""Files that are written atomically, JSON, and names of files."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfq.errors import OutputError

TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9_]+)-(?P<pid>[1-9][0-9]{0,9})\.[a-z0-9_]{8}\.tmp"
)
"""Name of a file that is being written: its later name, and host and process of the writer."""


def explain(error: OSError, path: Path) -> OutputError:
    """Convert an OSError of a failed write to an :class:`OutputError` with advice."""
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"No space left on the device while writing {str(path)!r}. Free some, or choose "
            "another place; files that were finished before are kept."
        )
    reason = error.strerror or str(error)
    return OutputError(f"Cannot write {str(path)!r}: {reason}. Choose a place that can be written.")


def host_name() -> str:
    """Return this host's name as it stands in names of temporary files."""
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32] or "host"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: write a temporary file, flush it to disk, then rename it.

    Raises:
        OutputError: the path cannot be written, or the disk is full.
    """
    try:
        writer = f"{host_name()}-{os.getpid()}"
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.{writer}.", suffix=".tmp", dir=path.parent
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~current_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise explain(error, path) from error


def sha256(path: Path) -> Any:
    """Return the SHA-256 of a file as a hash object."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def sha256_once(path: Path) -> Any:
    """As :func:`sha256`; a file that has kept its place, size and time is not read again by this
    process."""
    facts = path.stat()
    return _sha256_of(path.absolute(), facts.st_ino, facts.st_size, facts.st_mtime_ns).copy()


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, *_: int) -> Any:
    return sha256(path)


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


def current_umask() -> int:
    """Return the umask of the process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
