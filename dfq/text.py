"""Text of others, made safe to print."""

from __future__ import annotations

from rich.markup import escape as escape_markup


def printable(text: str) -> str:
    """The text with what is not printable written as Python writes it, such as ``\\x1b``.

    Names in files may hold what a terminal obeys.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def escape(text: str) -> str:
    """The same, and safe from rich's markup."""
    return escape_markup(printable(text))
