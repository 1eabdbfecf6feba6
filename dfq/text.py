"""Escaping of untrusted text, such as file names, for terminals and rich."""

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
