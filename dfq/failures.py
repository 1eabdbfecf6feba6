"""Conversion of exceptions from other libraries to dfq's errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dfq.errors import DfqError

LONGEST = 200
"""Largest number of characters that a message quotes of another error."""


@contextmanager
def explained(explain: Callable[[Exception], DfqError]) -> Iterator[None]:
    """Convert any exception of the block by ``explain``.

    For library code that may raise anything on a user's input, such as damaged files.
    Out-of-memory errors and dfq's own errors are not converted.
    """
    try:
        yield
    except DfqError:
        raise
    except Exception as error:  # the libraries document no list of errors
        if is_out_of_memory(error):
            raise
        raise explain(error) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened, or the name of its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip()[:LONGEST]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the machine or a device is out of memory."""
    return isinstance(error, MemoryError | _torch_error()) or "can't allocate memory" in str(error)


def _torch_error() -> type[RuntimeError]:
    """Return PyTorch's out-of-memory error, or a substitute if PyTorch is not loaded."""
    torch = sys.modules.get("torch")
    error: type[RuntimeError] = getattr(torch, "OutOfMemoryError", NotImplementedError)
    return error
