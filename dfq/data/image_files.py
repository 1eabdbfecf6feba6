"""Image files in folders: which there are, and which classes their folders are."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dfq.errors import DataError, nearest

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

SYSTEM_FOLDERS = {
    "#recycle",
    "$RECYCLE.BIN",
    "@eaDir",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}
"""Folders that archives, file servers and file systems add, with copies of images, parts of
them, or deleted ones."""

IMAGENET_CLASSES = 1000


def is_hidden(name: str) -> bool:
    """Whether a name is of a file or folder that programs keep for themselves."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def image_files(folder: Path, visited: frozenset[str] = frozenset()) -> list[Path]:
    """The image files of a folder at any depth, in the order of their paths.

    Hidden ones are left out.  Links are followed, to files and to folders; a folder that
    was visited already, here or among the real paths ``visited``, is not entered again.

    Raises:
        DataError: a link leads nowhere, or a folder cannot be read.
    """
    return sorted(_walk(folder, set(visited)))


def _walk(folder: Path, visited: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    for path in _entries(folder):
        if path.is_dir():
            yield from _walk(path, visited)
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, by name."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be read: {error.strerror}.") from error
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_symlink() and not os.path.exists(path):
            raise DataError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist. "
                "Restore that, or remove the link."
            )
    return paths


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out; links to folders are folders.

    Raises:
        DataError: a link leads nowhere, or the folder cannot be read.
    """
    return [path for path in _entries(folder) if path.is_dir()]


@dataclass(frozen=True)
class ClassNumbers:
    """Names of classes with their indices, and by which rule they have them.

    ``order``: ``imagenet synsets``; ``number`` or ``name``, in the order of timm's reader of
    image folders; or ``class map``.
    """

    index: dict[str, int]
    order: str


def number_classes(names: list[str], classes: int, where: str) -> ClassNumbers:
    """Number class folders for a model of so many ``classes``.

    For a model of 1000 classes, ImageNet synsets have ImageNet's indices.  Else the folders
    are all of the classes, in the order of timm's reader: by name without regard to case,
    numbers in it by their value.

    Raises:
        DataError: there are more folders than classes, or fewer, or their order is not defined.
    """
    if classes == IMAGENET_CLASSES:
        synsets = _imagenet_synsets()
        if set(names) <= set(synsets):
            return ClassNumbers({name: synsets[name] for name in names}, "imagenet synsets")
    if len(names) != classes:
        synset = " and they are not ImageNet synsets" if classes == IMAGENET_CLASSES else ""
        raise DataError(
            f"{where!r} has {len(names)} class folders, but the model has {classes} classes"
            f"{synset}. Give a folder for each class, or the index of each folder by a class map "
            "(class_map, --class-map FILE)."
        )
    ordered = _natural_order(names, where)
    by_number = all(name.isdecimal() for name in names)
    return ClassNumbers(
        {name: i for i, name in enumerate(ordered)}, "number" if by_number else "name"
    )


def _imagenet_synsets() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {name: i for i, name in enumerate(ImageNetInfo().label_names())}


def _natural_order(names: list[str], where: str) -> list[str]:
    """Names in the order of timm's :class:`ReaderImageFolder`."""
    from timm.utils.misc import natural_key

    try:
        ordered = sorted(sorted(names), key=natural_key)
        same = [(a, b) for a, b in pairwise(ordered) if natural_key(a) == natural_key(b)]
    except ValueError:  # a digit that is no decimal one, such as a superscript
        same = [(names[0], names[-1])]
    if same:
        first, second = same[0]
        raise DataError(
            f"{where!r} has the class folders {first!r} and {second!r}, whose order timm does not "
            "define. Rename one, or give a class map (class_map, --class-map FILE)."
        )
    return ordered


def read_class_map(path: Path, classes: int) -> dict[str, int]:
    """Names of classes with their indices below ``classes``, from a file.

    A ``.txt`` file has one name a line, in the order of the indices, as timm's class maps
    have; a ``.json`` file is an object of names and indices.

    Raises:
        DataError: the file is missing or malformed, a name or an index occurs twice, or an
            index is not one of the model's.
    """
    pairs = _read_pairs(path)
    for what, values in (("name", [n for n, _ in pairs]), ("index", [i for _, i in pairs])):
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise DataError(f"Class map {str(path)!r} has the {what} {value!r} {count} times.")
    for name, index in pairs:
        if not 0 <= index < classes:
            raise DataError(
                f"Class map {str(path)!r} gives {name!r} the index {index}; the model has "
                f"{classes} classes, 0 to {classes - 1}."
            )
    return dict(pairs)


def _read_pairs(path: Path) -> list[tuple[str, int]]:
    kind = path.suffix.lower()
    if kind not in (".txt", ".json"):
        what = "is pickled, which could run code" if kind == ".pkl" else f"ends in {kind!r}"
        raise DataError(
            f"Class map {str(path)!r} {what}; give a .txt file with a name a line, or a .json file "
            'with an object of names and indices, such as {"cat": 0, "dog": 1}.'
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"Class map {str(path)!r} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Class map {str(path)!r} cannot be read: {error}.") from error
    if kind == ".txt":
        lines = enumerate(line.strip() for line in text.split("\n"))
        pairs = [(name, index) for index, name in lines if name]
    else:
        pairs = _json_pairs(text, path)
    if not pairs:
        raise DataError(f"Class map {str(path)!r} names no class.")
    return pairs


def _json_pairs(text: str, path: Path) -> list[tuple[str, int]]:
    try:
        pairs: Any = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Class map {str(path)!r} is not valid JSON: {error}.") from error
    if not (text.lstrip().startswith("{") and all(type(index) is int for _, index in pairs)):
        raise DataError(
            f"Class map {str(path)!r} is no JSON object of names and whole numbers, such as "
            '{"cat": 0, "dog": 1}.'
        )
    return list(pairs)


def map_classes(names: list[str], class_map: dict[str, int], where: str, file: str) -> ClassNumbers:
    """The class folders that a class map numbers.

    Raises:
        DataError: a folder is not in the map.
    """
    unknown = [name for name in names if name not in class_map]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{where!r} has the class folder {unknown[0]!r}{more}, which the class map {file!r} "
            f"does not name.{nearest(unknown[0], class_map)}"
        )
    return ClassNumbers({name: class_map[name] for name in names}, "class map")
