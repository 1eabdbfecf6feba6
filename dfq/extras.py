"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from dfq.errors import ExtraError
from dfq.installation import install_command


def installed(package: str) -> bool:
    """Whether a package could be imported."""
    return find_spec(package) is not None


def require(package: str, extra: str) -> Any:
    """Import a package of the named extra.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExtraError(
            f"This needs the package {package!r}, which cannot be imported ({error}). "
            f"Install it with: {install_command(extra)}"
        ) from error
