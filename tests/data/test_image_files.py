"""Which files of a folder are images: hidden ones are not, and links are followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_vit
from PIL import Image

import dfq
from dfq.data.image_files import class_folders, image_files
from dfq.data.images import FolderImages, open_images
from dfq.errors import DataError
from dfq.vit import Preprocessing
from dfq.vit.convert import describe

ARCH = describe(make_vit(), "tiny")
PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3)
CLASSES = "abcde"


def save(path: Path, seed: int = 0) -> Path:
    """A readable image at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def spoil(path: Path) -> None:
    """Write an unreadable file with the name of an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")


def labeled(root: Path) -> Path:
    """An image for each of five classes."""
    for seed, name in enumerate(CLASSES):
        save(root / name / "0.png", seed)
    return root


def names(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in image_files(root)]


HIDDEN = [
    "._0.png",
    ".hidden.png",
    ".DS_Store",
    ".ipynb_checkpoints/0-checkpoint.png",
    ".git/objects/x.png",
    ".Trash-1000/files/x.png",
    "__MACOSX/._0.png",
    "__MACOSX/a/0.png",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "#recycle/0.png",
    "$RECYCLE.BIN/S-1-5-21/$R0.png",
    "System Volume Information/0.png",
    "lost+found/0.png",
]
"""Hidden files and folders of operating systems and programs."""

OTHERS = ["Thumbs.db", "desktop.ini", "ehthumbs.db", "notes.txt", "0.png.txt", "png", "labels.csv"]
"""Files that are no images by their names."""


@pytest.mark.parametrize("within", [".", "a", "a/more"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_no_images(name: str, within: str, tmp_path: Path) -> None:
    labeled(tmp_path)
    save(tmp_path / "a" / "more" / "1.png")
    spoil(tmp_path / within / name)
    assert names(tmp_path) == ["a/0.png", "a/more/1.png", *(f"{c}/0.png" for c in "bcde")]
    assert [folder.name for folder in class_folders(tmp_path)] == list(CLASSES)


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_kinds_are_no_images(name: str, tmp_path: Path) -> None:
    labeled(tmp_path)
    for folder in (tmp_path, tmp_path / "a"):
        spoil(folder / name)
    assert names(tmp_path) == [f"{c}/0.png" for c in CLASSES]


def test_a_folder_whose_own_path_is_hidden_is_read(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "__MACOSX" / ".val"
    assert names(labeled(root)) == [f"{c}/0.png" for c in CLASSES]


def test_pipes_are_no_images(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    assert names(tmp_path) == ["0.png"]


# ---- links


def test_links_to_files_are_images_by_the_name_of_the_link(tmp_path: Path) -> None:
    target = save(tmp_path / "elsewhere" / "blob")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.png").symlink_to(target)
    (folder / "1.png").symlink_to("0.png")
    (folder / "2").symlink_to(target)
    assert names(folder) == ["0.png", "1.png"]


def test_links_to_folders_are_folders(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "deep" / "0.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    assert names(folder) == ["a/deep/0.png"]
    assert [path.name for path in class_folders(folder)] == ["a"]


def test_a_link_to_the_folder_itself_is_followed(tmp_path: Path) -> None:
    labeled(tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    assert names(tmp_path / "link") == [f"{c}/0.png" for c in CLASSES]


CYCLES: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "to itself": lambda root: (root / "a" / "loop", "."),
    "to what is above": lambda root: (root / "a" / "loop", ".."),
    "to what is above, by its whole path": lambda root: (root / "a" / "loop", str(root)),
    "to the root of the file system's part": lambda root: (root / "a" / "b" / "loop", "../.."),
}


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES.keys())
def test_cycles_of_links_end(cycle: Callable[[Path], tuple[Path, str]], tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "a" / "b" / "1.png")
    link, target = cycle(tmp_path)
    link.symlink_to(target)
    assert names(tmp_path) == ["a/0.png", "a/b/1.png"]


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        save(tmp_path / one / "0.png")
        (tmp_path / one / "link").symlink_to(Path("..") / other)
    assert len(names(tmp_path)) == 2


def test_a_class_that_links_above_holds_its_own_images_alone(tmp_path: Path) -> None:
    labeled(tmp_path)
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    source = open_images(tmp_path, ARCH, PREPROCESSING, labeled=True)
    assert [source.label(i) for i in range(len(source))] == [0, 1, 2, 3, 4]


def test_classes_that_link_to_one_folder_hold_it_each(tmp_path: Path) -> None:
    save(tmp_path / "all" / "0.png")
    for name in CLASSES:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tmp_path / "all")
    source = open_images(tmp_path / "data", ARCH, PREPROCESSING, labeled=True)
    assert [source.label(i) for i in range(len(source))] == [0, 1, 2, 3, 4]


BROKEN = {"to nothing": "nowhere", "to itself": "link.png", "in a circle": "other.png"}


@pytest.mark.parametrize("name", ["link.png", "a/link.png", "link"])
@pytest.mark.parametrize("target", BROKEN.values(), ids=BROKEN.keys())
def test_links_that_lead_nowhere_are_refused(target: str, name: str, tmp_path: Path) -> None:
    labeled(tmp_path)
    link = tmp_path / name
    link.symlink_to(target)
    if target == "other.png":
        (link.parent / target).symlink_to(link.name)
    with pytest.raises(DataError, match=r"is a link to '.*', which does not exist. Restore"):
        image_files(tmp_path)


def test_hidden_links_may_lead_nowhere(tmp_path: Path) -> None:
    labeled(tmp_path)
    (tmp_path / ".#lock.png").symlink_to("user@host.1234")
    (tmp_path / "a" / ".link").symlink_to("nowhere")
    assert len(names(tmp_path)) == 5


# ---- every option that reads images

FAST = {"iterations": 2, "stages": 2, "threads": 1}


def quantize(weights: Path, out: Path, **changes: Any) -> Any:
    named: dict[str, Any] = {"weights": weights, "img_size": 32, "out": out}
    return dfq.quantize("test_vit", images=8, settings={"inversion": FAST}, **named, **changes)


def distill(weights: Path, out: Path, **changes: Any) -> Any:
    named: dict[str, Any] = {"weights": weights, "img_size": 32, "out": out}
    settings: dict[str, Any] = {"inversion": FAST, "distillation": {"batch": 4}}
    return dfq.distill("test_vit", images=8, steps=1, settings=settings, **named, **changes)


def evaluate(weights: Path, out: Path, data: Path) -> Any:
    quantize(weights, out, calibration=data)
    return dfq.evaluate(out, data=data)


OPTIONS: dict[str, Callable[[Path, Path, Path], int]] = {
    "quantize --calibration": lambda w, out, d: quantize(w, out, calibration=d).calibration.images,
    "quantize --eval": lambda w, out, d: quantize(w, out, eval=d).agreement_on.images,
    "evaluate --data": lambda w, out, d: evaluate(w, out, d).images,
    "distill --data": lambda w, out, d: distill(w, out, data=d).data.images,
    "distill --eval": lambda w, out, d: distill(w, out, eval=d).images,
}


@pytest.mark.parametrize("count", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_reads_the_same_files(
    count: Callable[[Path, Path, Path], int], small_weights: Path, tmp_path: Path
) -> None:
    data = labeled(tmp_path / "data")
    for name in (*HIDDEN, *OTHERS):
        spoil(data / name)
        spoil(data / "a" / name)
    (data / "b" / "link.png").symlink_to(save(tmp_path / "elsewhere" / "file"))
    (data / "c" / "link").symlink_to(save(tmp_path / "elsewhere" / "in" / "0.png").parent)
    (data / "d" / "loop").symlink_to(data)
    assert count(small_weights, tmp_path / "out", data) == 7


@pytest.mark.parametrize("labels", [True, None, False])
def test_images_are_the_same_with_labels_and_without(labels: bool | None, tmp_path: Path) -> None:
    data = labeled(tmp_path)
    for name in HIDDEN:
        spoil(data / name)
    (data / "e" / "loop").symlink_to(data)
    source = open_images(data, ARCH, PREPROCESSING, labeled=labels)
    assert isinstance(source, FolderImages)
    assert [path.parent.name for path in source.files] == list(CLASSES)
