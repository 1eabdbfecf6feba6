"""Other tools' chatter, kept off the caller's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

NO_TELEMETRY = {"NNCF_CI": "1"}
"""Without it NNCF reports its use to its makers."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, progress bars, warnings or telemetry of what runs inside."""
    kept = {name: os.environ.get(name) for name in NO_TELEMETRY}
    disabled = logging.root.manager.disable
    os.environ.update(NO_TELEMETRY)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
