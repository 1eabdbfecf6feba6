"""Exceptions raised by dfq, one class per cause.

::

    DfqError                     exit code of the command line
    ├── UsageError                                           2
    │   ├── SettingError         a setting out of its range, or an unknown choice
    │   ├── RecipeError          a recipe file that is missing or malformed
    │   ├── DeviceError          a device that is not there
    │   ├── UnknownModelError    no model of that name
    │   ├── UnsupportedModelError  a model that is no patch ViT
    │   ├── WeightsError         weights that are missing, damaged or of another model
    │   ├── PretrainedError      pretrained weights that cannot be downloaded
    │   ├── DataError            images that are missing or unreadable
    │   ├── DatasetError         a directory that is no sparse-image dataset, or another model's
    │   │   └── DamagedError     a file whose contents are not what was written
    │   ├── CheckpointError      a directory that is no dfq checkpoint, or a damaged one
    │   ├── OutputError          a place that cannot be written
    │   └── ExtraError           an optional package that is not installed
    └── RunError                                             1
        ├── GateError            a result below the caller's bound
        └── WorkerError          another process of the same run has died
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DfqError(Exception):
    """Base of all errors that dfq raises on purpose.

    The message is ``facts`` followed by ``advice``; a caller may replace the advice.
    """

    exit_code = 1

    def __init__(self, facts: str, advice: str = "") -> None:
        super().__init__(f"{facts} {advice}".rstrip())
        self.facts, self.advice = facts, advice


class UsageError(DfqError):
    """The caller's request is invalid."""

    exit_code = 2


class SettingError(UsageError):
    """A setting is out of range, or names an unknown choice."""


class RecipeError(UsageError):
    """A recipe file is missing or malformed."""


class DeviceError(UsageError):
    """The requested device does not exist here."""


class UnknownModelError(UsageError):
    """No model has that name."""


class UnsupportedModelError(UsageError):
    """The model is not a patch vision transformer that dfq knows.

    ``reason``: what about the model is not supported, without its name.
    """

    def __init__(self, facts: str, advice: str = "", *, reason: str = "") -> None:
        super().__init__(facts, advice)
        self.reason = reason


class WeightsError(UsageError):
    """Weights are missing, damaged, or belong to another architecture."""


class PretrainedError(UsageError):
    """Pretrained weights do not exist or cannot be downloaded."""


class DataError(UsageError):
    """Images or labels are missing, unreadable or do not fit the model."""


class DatasetError(UsageError):
    """A directory is not a sparse-image dataset, or was made from another model."""


class DamagedError(DatasetError):
    """A dataset file does not hold what was written to it."""


class CheckpointError(UsageError):
    """A directory is not a dfq checkpoint, or its files are damaged."""


class OutputError(UsageError):
    """An output path cannot be written, or holds other files."""


class ExtraError(UsageError):
    """An optional package is not installed."""


class RunError(DfqError):
    """A valid request failed while it ran."""


class WorkerError(RunError):
    """Another process of the same run has died."""


class GateError(RunError):
    """A measured result is below the bound that the caller set.

    ``result`` is the result that the function would have returned.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def nearest(name: str, known: Iterable[str], count: int = 4) -> str:
    """Suggest the known names closest to ``name``, as the end of an error message."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
