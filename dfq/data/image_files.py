"""Image files in folders, and class indices of class folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dfq.argument_names import option
from dfq.errors import DataError, nearest
from dfq.files import parse_json

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

SYSTEM_FOLDERS = {
    "#recycle",
    "$RECYCLE.BIN",
    "@eaDir",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}
"""Folders created by archives, file servers and file systems, with copies or fragments of
images."""

IMAGENET_CLASSES = 1000


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def image_files(folder: Path, visited: frozenset[str] = frozenset()) -> list[Path]:
    """Find image files in a folder recursively, sorted by path.

    Hidden files are skipped and links are followed.  A folder is entered once; ``visited`` holds
    real paths that are not entered at all.

    Raises:
        DataError: a link is broken, or a folder cannot be read.
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
    """List the entries of a folder that are not hidden, sorted by name."""
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
    """List the class folders in a folder: its folders and links to folders, except hidden ones.

    Raises:
        DataError: a link is broken, or the folder cannot be read.
    """
    return [path for path in _entries(folder) if path.is_dir()]


@dataclass(frozen=True)
class ClassNumbers:
    """Class indices by name.

    ``order`` is the rule: ``imagenet synsets``; ``number`` or ``name``, in the order of timm's
    reader of image folders; or ``class map``.
    """

    index: dict[str, int]
    order: str


def number_classes(names: list[str], classes: int, where: str) -> ClassNumbers:
    """Assign class indices to class folders.

    With 1000 classes, ImageNet synsets get ImageNet's indices.  Otherwise there must be one folder
    per class, and they get the order of timm's reader: by name, ignoring case, with numbers
    compared by value.

    Raises:
        DataError: the number of folders is not ``classes``, or their order is ambiguous.
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
            f"({option('class_map', metavar='FILE')})."
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
    """Sort names as timm's ``ReaderImageFolder`` does."""
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
            f"define. Rename one, or give a class map ({option('class_map', metavar='FILE')})."
        )
    return ordered


def read_class_map(path: Path, classes: int) -> dict[str, int]:
    """Read a class map: class indices below ``classes``, by name.

    A ``.txt`` file has one name per line in the order of the indices, like timm's class maps; a
    ``.json`` file is an object that maps names to indices.

    Raises:
        DataError: the file is missing or malformed, a name or an index occurs twice, or an
            index is out of range.
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
        pairs: Any = parse_json(text, pairs=list)
    except ValueError as error:
        raise DataError(f"Class map {str(path)!r} is not valid JSON: {error}.") from error
    if not (text.lstrip().startswith("{") and all(type(index) is int for _, index in pairs)):
        raise DataError(
            f"Class map {str(path)!r} is no JSON object of names and whole numbers, such as "
            '{"cat": 0, "dog": 1}.'
        )
    return list(pairs)


def map_classes(names: list[str], class_map: dict[str, int], where: str, file: str) -> ClassNumbers:
    """Assign class indices to class folders by a class map.

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
