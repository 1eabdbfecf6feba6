"""Folders of image files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from image_sources import ARCH, GRAY, folder, opened, save_image
from PIL import Image
from timm.data import ImageNetInfo

from dfq.data.images import FolderImages
from dfq.errors import DataError


def test_classes_are_the_sorted_names_of_folders(tmp_path: Path) -> None:
    source = opened(folder(tmp_path, ["e", "b", "d", "a", "c"]))
    assert isinstance(source, FolderImages)
    actual = {f.parent.name: source.label(i) for i, f in enumerate(source.files)}
    assert actual == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    source = opened(folder(tmp_path, list("abcde")))
    assert isinstance(source, FolderImages)
    assert [str(f.relative_to(tmp_path)) for f in source.files] == [
        f"{c}/{i}.png" for c in "abcde" for i in (0, 1)
    ]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    folder(tmp_path, [*"abcde", ".cache"])
    assert len(opened(tmp_path)) == 10


def test_images_lie_at_any_depth_of_their_class(tmp_path: Path) -> None:
    folder(tmp_path, list("abcde"), each=1)
    save_image(tmp_path / "b" / "more" / "x.png", 20, 20, 3)
    source = opened(tmp_path)
    assert [source.label(i) for i in range(len(source))] == [0, 1, 1, 2, 3, 4]


def test_other_files_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, list("abcde"), each=1)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "labels.csv").write_text("a,0")
    assert len(opened(tmp_path)) == 5


@pytest.mark.parametrize("name", ["x.JPG", "x.jpeg", "x.Png", "x.webp", "x.tif", "x.bmp"])
def test_endings_are_known_in_any_case(name: str, tmp_path: Path) -> None:
    save_image(tmp_path / name, 20, 20, 3)
    assert len(opened(tmp_path, labeled=False)) == 1


@pytest.mark.parametrize("count", [4, 6])
def test_another_number_of_classes_than_the_model_is_refused(count: int, tmp_path: Path) -> None:
    folder(tmp_path, [f"c{i}" for i in range(count)], each=1)
    with pytest.raises(DataError, match=f"{count} class folders, but the model has 5 classes"):
        opened(tmp_path)


def test_imagenet_folders_are_the_classes_of_a_model_of_imagenet(tmp_path: Path) -> None:
    synsets = ImageNetInfo().label_names()
    imagenet = dataclasses.replace(ARCH, num_classes=1000)
    source = opened(folder(tmp_path, [synsets[n] for n in (980, 0, 417)], each=1), imagenet)
    assert [source.label(i) for i in range(3)] == [0, 417, 980]


def test_imagenet_folders_of_another_model_are_counted(tmp_path: Path) -> None:
    synsets = ImageNetInfo().label_names()
    source = opened(folder(tmp_path, [synsets[n] for n in (980, 0, 417, 3, 8)], each=1))
    assert [source.label(i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_other_folders_for_a_model_of_imagenet_are_refused(tmp_path: Path) -> None:
    imagenet = dataclasses.replace(ARCH, num_classes=1000)
    folder(tmp_path, ["cat", ImageNetInfo().label_names()[0]], each=1)
    with pytest.raises(DataError, match=r"2 class folders.*1000 classes.*not ImageNet synsets"):
        opened(tmp_path, imagenet)


def test_a_folder_without_class_folders_has_no_labels(tmp_path: Path) -> None:
    save_image(tmp_path / "x.png", 20, 20, 3)
    with pytest.raises(DataError, match="no class folders"):
        opened(tmp_path)


def test_empty_class_folders_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, list("abcde"), each=0)
    for name in "abcde":
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="no images in its 5 class folders"):
        opened(tmp_path)


def test_an_empty_folder_is_refused_for_calibration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images.*\.png"):
        opened(tmp_path, labeled=False)


def test_labels_are_not_asked_for_in_calibration(tmp_path: Path) -> None:
    source = opened(folder(tmp_path, ["a", "b"]), labeled=False)
    assert [source.label(i) for i in range(4)] == [-1] * 4


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif", "webp", "ppm"])
@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_an_unreadable_image_is_named(how: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    save_image(path, 40, 50, 3)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}[how])
    with pytest.raises(DataError, match=rf"x\.{ending}' cannot be read as an image"):
        opened(tmp_path, labeled=False).pixels(0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_color_mode_becomes_the_models(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (200, 200, 200)).convert(mode)
    image.save(tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png"))
    pixels = opened(tmp_path, labeled=False).pixels(0)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8


def test_gray_images_of_16_bits_keep_their_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 128 << 8, dtype=np.uint16)).save(tmp_path / "x.png")
    pixels = opened(tmp_path, GRAY, labeled=False).pixels(0)
    assert set(pixels.flatten()) <= {127, 128}


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    pixels = opened(tmp_path, labeled=False).pixels(0)
    assert pixels[8, 8].tolist() == [10, 20, 30]


def test_color_files_become_gray_for_a_model_of_one_channel(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "x.png")
    pixels = opened(tmp_path, GRAY, labeled=False).pixels(0)
    assert pixels.shape == (16, 16, 1)
    assert set(pixels.flatten()) == {76}


@pytest.mark.parametrize("channels", [2, 5])
def test_a_model_of_other_channels_takes_no_image_files(channels: int, tmp_path: Path) -> None:
    save_image(tmp_path / "x.png", 20, 20, 3)
    arch = dataclasses.replace(ARCH, in_channels=channels)
    with pytest.raises(DataError, match=f"1, 3 or 4 channels; the model takes {channels}"):
        opened(tmp_path, arch, labeled=False).pixels(0)
