"""Escaping of untrusted text for terminals, and format of durations."""

from __future__ import annotations

import sys

from rich.markup import escape as escape_markup


def printable(text: str) -> str:
    """Replace unprintable characters by Python escapes such as ``\\x1b``; newlines are kept.

    Untrusted text may contain terminal control sequences.  Characters that stdout's encoding
    lacks are escaped here and not by the stream, so that tables know their widths.
    """
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape(text: str) -> str:
    """Escape unprintable characters and rich's markup."""
    return escape_markup(printable(text))


def clock_time(seconds: float) -> str:
    """Format seconds as ``m:ss``, from an hour on as ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def duration(seconds: float, digits: int = 1) -> str:
    """Format seconds with ``digits`` decimals and their unit, from a minute on as ``m:ss``."""
    text = f"{seconds:.{digits}f}"
    return f"{text} s" if float(text) < 60 else clock_time(seconds)
