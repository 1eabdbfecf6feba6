"""Reading of files that ``torch.save`` wrote, without running code of theirs."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from dfq.errors import WeightsError
from dfq.failures import explained, first_line


class Placeholder:
    """Substitute for an object stored beside the weights; accepts any arguments, keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class PlaceholderDict:
    """Substitute for a subclass of dict; constructing it gives an empty ``OrderedDict``."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


CLASSES = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "easydict.EasyDict",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.Path",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePath",
    "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "uuid.UUID",
)
"""Classes of objects that training scripts pickle beside weights."""

FUNCTIONS = (
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
)
"""Functions that make NumPy's arrays and numbers when they are unpickled."""

DICTS = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
"""Subclasses of dict that training scripts pickle beside weights."""

SUBSTITUTES: list[Any] = [
    *((Placeholder, name) for name in (*CLASSES, *FUNCTIONS)),
    *((PlaceholderDict, name) for name in DICTS),
]
"""What is constructed or called in the place of the above; none of them is imported."""

_reading = threading.Lock()
"""Held while a file is read: the filters of warnings, too, are those of the whole process."""


def read_torch(path: Path) -> Any:
    """Read what a file holds; :data:`SUBSTITUTES` take the place of objects beside the weights.

    torch keeps the list of what its unpickler allows for the whole process.  It is extended only
    while a file that holds such objects is read, by one thread at a time.  What another thread
    reads with ``torch.load`` in that time may hold a :class:`Placeholder` where it would have been
    refused.

    Raises:
        WeightsError: the file is damaged, or holds other objects.
    """

    def explain(error: Exception) -> WeightsError:
        if "Weights only load failed" in str(error):
            return WeightsError(
                f"{str(path)!r} holds more than weights{_blocked(error)}, which is never "
                "unpickled. Save model.state_dict(), or use safetensors."
            )
        return WeightsError(
            f"{str(path)!r} is not a whole torch file ({first_line(error)}). Check that the "
            "download is complete."
        )

    with explained(explain), _reading, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of unusual protocols and sparse tensors
        try:
            return _load(path)
        except pickle.UnpicklingError:
            with torch.serialization.safe_globals(SUBSTITUTES):
                return _load(path)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _blocked(error: Exception) -> str:
    _, found, rest = str(error).partition("GLOBAL ")
    return f" ({rest.split()[0]:.100})" if found and rest.split() else ""
