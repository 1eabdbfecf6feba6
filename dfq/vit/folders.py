"""Folders that timm saved (``timm.models.save_for_hf``): weights beside a ``config.json``."""

from __future__ import annotations

import os
from pathlib import Path

from dfq.argument_names import option
from dfq.errors import UnknownModelError, WeightsError
from dfq.vit.weights import SHARD

LOCAL_PREFIX = "local-dir:"
"""Prefix of the path of such a folder in a model's name."""

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
"""Names of weights files in a model folder, in order of preference."""

SUFFIXES = ("*.index.json", "*.safetensors", "*.pth", "*.bin")


def named_folder(name: str) -> Path:
    """Return the folder of a name that begins with :data:`LOCAL_PREFIX`.

    Raises:
        UnknownModelError: there is none.
    """
    folder = Path(name.removeprefix(LOCAL_PREFIX))
    if name == LOCAL_PREFIX or not os.path.isdir(folder):
        raise UnknownModelError(
            f"{name!r} names no folder. Give the path of one that timm saved after "
            f"{LOCAL_PREFIX!r}."
        )
    return folder


def find_weights(folder: Path) -> Path:
    """Return the weights file in a model folder: by timm's names, or the only one.

    Raises:
        WeightsError: there is none, or there are several under other names.
    """
    named = next((folder / name for name in NAMES if os.path.isfile(folder / name)), None)
    if named is not None:
        return named
    found = [f for suffix in SUFFIXES for f in sorted(folder.glob(suffix)) if os.path.isfile(f)]
    whole = [file for file in found if not SHARD.search(file.name)]
    if len(whole) > 1:
        shown = ", ".join(repr(file.name) for file in whole[:4])
        more = f" and {len(whole) - 4} others" if len(whole) > 4 else ""
        raise WeightsError(
            f"The folder {str(folder)!r} has {len(whole)} files of weights ({shown}{more}), none "
            f"under a name of timm's ({NAMES[0]}). Give the one that is meant with "
            f"{option('weights', metavar='FILE')}."
        )
    if not found:
        raise WeightsError(
            f"The folder {str(folder)!r} has no file of weights ({', '.join(NAMES)}). Give one "
            f"with {option('weights')}."
        )
    return (whole or found)[0]
