"""Standard streams that may be closed, full, or unable to encode some characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

from dfq.errors import OutputError


def settle() -> None:
    """Make the standard streams of this process safe to print to.

    Closed descriptors become the null device, so that no file gets their number and what native
    code prints; ``sys.stdout`` stays None then.  What cannot be written to stderr is dropped, as a
    message must not change how a command ends; stdout raises :class:`OutputError`, or
    BrokenPipeError, once.  Characters that an encoding lacks are written as escapes.
    """
    for descriptor in (0, 1, 2):
        _occupy(descriptor)
    if sys.stdout is not None:
        sys.stdout = _guarded(sys.stdout, strict=True)
    if sys.stderr is not None:
        sys.stderr = _guarded(sys.stderr, strict=False)
    else:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


def _guarded(stream: TextIO, *, strict: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Guarded(stream, strict)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=not strict or stream.isatty(),
    )


class _Guarded(io.RawIOBase):
    """File of a stream; failures are raised once if ``strict``, else ignored."""

    def __init__(self, stream: TextIO, strict: bool) -> None:
        buffer: Any = stream.buffer
        self._raw = getattr(buffer, "raw", buffer)
        self._stream = stream  # which would close the file at its end
        self._strict, self._failed = strict, False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: Any, /) -> int:
        if self._failed:
            return len(data)
        try:
            written: int | None = self._raw.write(data)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return written
        except OSError as error:
            if not self._strict:
                return len(data)  # a full disk may have room again later
            self._failed = True
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"Cannot write to standard output: {error.strerror}.") from error
