"""Errors of the file system that tests cause."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NoReturn

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def failing(error: BaseException) -> Callable[..., NoReturn]:
    """Return a function that raises an error, whatever it is given."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail
