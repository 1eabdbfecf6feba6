"""Settings of a sparse-image dataset (``settings.json``), their checks and the cache key.

The format is specified in ``docs/dataset-format.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfq.errors import CheckpointError, DatasetError, SettingError
from dfq.files import read_json
from dfq.recipe import METHODS, InversionSettings
from dfq.sparse import Grid
from dfq.vit.architecture import LARGEST, Architecture, Preprocessing, from_json
from dfq.vit.preprocessing import preprocessing_problem

FORMAT = "dfq-sparse-images"
FORMAT_VERSION = 1
SETTINGS, MANIFEST = "settings.json", "manifest.json"
ORIGIN = re.compile(r"[a-z][a-z0-9-]{0,31}")
"""Pattern of the name of a method that makes images."""


def cache_key(settings: dict[str, Any]) -> str:
    """Return a hash (32 hex digits) of everything in ``settings.json`` that determines the images.

    Threads, machine and library versions are recorded but not hashed: datasets made with others
    are equally valid.
    """
    recorded = ("threads", "machine", "versions")
    facts = {k: v for k, v in settings.items() if k not in recorded}
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_settings(path: Path) -> dict[str, Any]:
    """Read ``settings.json`` of a dataset directory.

    Raises:
        DatasetError: the file is missing, malformed or of an unknown version.
    """
    file = path / SETTINGS
    if not file.is_file():
        raise DatasetError(f"{str(path)!r} is not a sparse-image dataset: it has no {SETTINGS}.")
    settings = read_object(file)
    check_header(settings, file)
    for field, valid in _FIELDS.items():
        if field in settings and not valid(settings[field]):
            raise _not_allowed(file, field, settings[field])
    return settings


def _not_allowed(file: Path, field: str, value: Any, why: str = "") -> DatasetError:
    return DatasetError(
        f"{str(file)!r}: {field} is {value!r:.80}, which docs/dataset-format.md does not allow"
        f"{why}. The dataset is damaged; make it again."
    )


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_word(value.get("name", "?"))
        and ("architecture" not in value or _is_architecture(value["architecture"]))
        and re.fullmatch("[0-9a-f]{64}", str(value.get("fingerprint", "0" * 64))) is not None
    )


def _is_architecture(value: Any) -> bool:
    try:
        from_json(Architecture, value)
    except CheckpointError:
        return False
    return True


def _is_preprocessing(value: Any) -> bool:
    """Whether mean, std and input range are numbers and consistent, as far as given."""
    if not isinstance(value, dict):
        return False
    given = [value.get("mean", []), value.get("std", []), value.get("input_range", [0, 1])]
    if not all(
        isinstance(numbers, list)
        and all(type(v) in (int, float) and abs(v) <= LARGEST for v in numbers)
        for numbers in given
    ):
        return False
    mean, std, span = (tuple(map(float, numbers)) for numbers in given)
    if len(span) != 2 or len(mean) != len(std):
        return False
    if not mean:
        return not {"mean", "std"} & set(value) and span[0] < span[1]
    prepared = Preprocessing(mean, std, input_range=(span[0], span[1]))
    return preprocessing_problem(prepared) is None


def _is_inversion(value: Any) -> bool:
    """Whether it is an object with the name of a method."""
    return isinstance(value, dict) and ORIGIN.fullmatch(str(value.get("method", "a"))) is not None


def inversion_of(settings: dict[str, Any], path: Path) -> InversionSettings | None:
    """Return the inversion settings of a dataset, ``path``; None if dfq did not invert its images.

    Settings that are not recorded get their defaults.

    Raises:
        DatasetError: a value is not allowed.
    """
    recorded = settings.get("inversion", {})
    if recorded.get("method") not in METHODS:
        return None
    known = {f.name for f in dataclasses.fields(InversionSettings)}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items() if k in known
    }
    try:
        return InversionSettings(**{"threads": settings.get("threads"), **given})
    except SettingError as error:
        raise _not_allowed(path / SETTINGS, "inversion", recorded, f" ({error})") from error


def label_bound(settings: dict[str, Any]) -> int | None:
    """Return the number that the labels of a dataset are below, None where it says nothing."""
    objective = settings.get("objective")
    if objective == "binary":
        return 2
    classes = settings.get("model", {}).get("architecture", {}).get("num_classes")
    return classes if objective == "class" else None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) < 1024


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _are_words(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_word, [*value, *value.values()]))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "algorithm_version": _is_count,
    "model": _is_model,
    "preprocessing": _is_preprocessing,
    "units": lambda value: value == "input range",
    "objective": lambda value: value in ("class", "binary", "direction"),
    "inversion": _is_inversion,
    "threads": _is_count,
    "machine": _is_word,
    "versions": _are_words,
}
"""Checks of the fields of ``settings.json`` other than header and grid."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DatasetError: the file cannot be read or is not a JSON object.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{str(path)!r} cannot be read as JSON: {error}. Remove the dataset (`dfq cache "
            "remove`, if it is in the cache) and make it again."
        ) from error
    if not isinstance(value, dict):
        raise DatasetError(f"{str(path)!r} must hold a JSON object.")
    return value


def check_header(value: dict[str, Any], path: Path) -> None:
    """Raise :class:`DatasetError` unless format and version are those of this dfq."""
    if value.get("format") != FORMAT:
        raise DatasetError(f"{str(path)!r} is not of format {FORMAT!r}.")
    version = value.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise DatasetError(
            f"{str(path)!r} has format version {version!r}; this dfq reads "
            f"{FORMAT_VERSION}. Make the dataset again, or install the dfq that wrote it."
        )


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """Convert a grid to JSON types."""
    return {
        "image_size": list(grid.image_size),
        "patch_size": list(grid.patch_size),
        "channels": grid.channels,
    }


def grid_from_json(value: Any) -> Grid:
    """Invert :func:`grid_to_json`; raises ValueError, KeyError or TypeError."""
    height, width = value["image_size"]
    patch_height, patch_width = value["patch_size"]
    numbers = (height, width, patch_height, patch_width, value["channels"])
    if not all(type(v) is int and 0 < v < 1 << 20 for v in numbers):
        raise ValueError(f"grid {value!r:.120}")
    if patch_height > height or patch_width > width:
        raise ValueError(f"patches larger than the image: {value!r:.120}")
    return Grid((height, width), (patch_height, patch_width), value["channels"])
