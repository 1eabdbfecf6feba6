"""Malformed contents of dfq's JSON files, which every reader must refuse without a traceback."""

from __future__ import annotations

MALFORMED = {
    "empty": b"",
    "cut": b"{",
    "array": b"[]",
    "null": b"null",
    "string": b'"text"',
    "object": b"{}",
    "binary": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "deep-value": b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long-number": b'{"format_version": ' + b"1" * 5000 + b"}",
}
