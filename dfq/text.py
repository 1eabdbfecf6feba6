"""Text of others, made safe to print."""

from __future__ import annotations

import sys

from rich.markup import escape as escape_markup


def printable(text: str) -> str:
    """The text with what is not printable written as Python writes it, such as ``\\x1b``.

    Names in files may hold what a terminal obeys.  Characters that stdout's encoding lacks are
    written so too, here and not by the stream, so that tables know how wide they are.
    """
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape(text: str) -> str:
    """The same, and safe from rich's markup."""
    return escape_markup(printable(text))
