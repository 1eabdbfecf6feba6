"""Suppression of other tools' output."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

NO_TELEMETRY = {"NNCF_CI": "1"}
"""Environment variables that disable NNCF's telemetry."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress logging, progress bars, warnings and telemetry inside the block."""
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
