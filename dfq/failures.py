"""Errors that other people's code may raise, as dfq's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dfq.errors import DfqError

LONGEST = 200
"""Characters of a reason that a message quotes."""


@contextmanager
def explained(explain: Callable[[Exception], DfqError]) -> Iterator[None]:
    """Turn whatever the block raises into what ``explain`` makes of it.

    For code that is given what a user brought, damaged bytes or a model of any make, and has no
    list of what it raises.  Full memory, and dfq's own errors, are left as they are.
    """
    try:
        yield
    except DfqError:
        raise
    except Exception as error:  # whatever that code raises; there is no list
        if is_out_of_memory(error):
            raise
        raise explain(error) from error


def first_line(error: Exception) -> str:
    """What an error says, shortened, or what it is where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip()[:LONGEST]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is full, of this machine or of a device."""
    return isinstance(error, MemoryError | _torch_error()) or "can't allocate memory" in str(error)


def _torch_error() -> type[RuntimeError]:
    """PyTorch's error of full memory, if PyTorch has been loaded at all."""
    torch = sys.modules.get("torch")
    found: type[RuntimeError] = getattr(torch, "OutOfMemoryError", NotImplementedError)
    return found
