"""Labeled and plain images of the user's: arrays, sizes and batches."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import ARCH, GRAY, PREPROCESSING, folder, noise, opened
from PIL import Image
from timm.data import create_transform

from dfq import demo
from dfq.data.images import DenseImages, fit, load_batches, open_images
from dfq.errors import DataError
from dfq.sparse import unpatchify
from dfq.vit import Architecture
from dfq.vit.convert import describe
from dfq.vit.load import load_model


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# ---- arrays


def test_an_npz_gives_its_pixels_and_labels(tmp_path: Path) -> None:
    x = noise(6, 16, 16, 3)
    source = opened(save_npz(tmp_path / "a.npz", x=x, y=np.array([0, 1, 2, 3, 4, 0])))
    assert [source.label(i) for i in range(len(source))] == [0, 1, 2, 3, 4, 0]
    assert all(np.array_equal(source.pixels(i), x[i]) for i in range(6))


def test_an_npz_is_called_by_its_path(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=noise(1, 16, 16, 3), y=np.array([0]))
    assert opened(path).name == str(path)


def test_a_compressed_npz_is_read(tmp_path: Path) -> None:
    x = noise(2, 16, 16, 3)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.array([0, 1]))
    assert np.array_equal(opened(tmp_path / "a.npz").pixels(1), x[1])


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32, np.int64, np.uint64])
def test_labels_may_be_any_whole_numbers(kind: Any, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=noise(2, 16, 16, 3), y=np.array([4, 0], dtype=kind))
    assert opened(path).label(0) == 4


def test_arrays_are_resized_whole(tmp_path: Path) -> None:
    x = np.zeros((1, 8, 32, 3), dtype=np.uint8)
    x[:, :, 16:] = 255
    path = save_npz(tmp_path / "a.npz", x=x, y=np.array([0]))
    pixels = opened(path).pixels(0)
    assert pixels.shape == (16, 16, 3)
    assert pixels[:, 0].max() < 10
    assert pixels[:, -1].min() > 245


def test_arrays_without_labels_are_enough_for_calibration(tmp_path: Path) -> None:
    source = opened(save_npz(tmp_path / "a.npz", x=noise(3, 16, 16, 3)), labeled=False)
    assert (len(source), source.label(0)) == (3, -1)


def test_labels_beyond_the_model_do_not_matter_for_calibration(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=noise(1, 16, 16, 3), y=np.array([999]))
    assert len(opened(path, labeled=False)) == 1


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 16, 16, 1)], ids=str)
def test_gray_arrays_fit_a_model_of_one_channel(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = noise(*shape)
    path = save_npz(tmp_path / "a.npz", x=x, y=np.array([0, 1]))
    assert np.array_equal(opened(path, GRAY).pixels(1), x[1].reshape(16, 16, 1))


def test_gray_arrays_are_repeated_for_a_model_of_three_channels(tmp_path: Path) -> None:
    x = noise(1, 16, 16)
    pixels = opened(save_npz(tmp_path / "a.npz", x=x, y=np.array([0]))).pixels(0)
    assert np.array_equal(pixels, np.repeat(x[0][..., None], 3, axis=2))


def test_color_arrays_become_gray_for_a_model_of_one_channel(tmp_path: Path) -> None:
    x = np.full((1, 16, 16, 3), (255, 0, 0), dtype=np.uint8)
    pixels = opened(save_npz(tmp_path / "a.npz", x=x, y=np.array([0])), GRAY).pixels(0)
    assert pixels.shape == (16, 16, 1)
    assert set(pixels.flatten()) == {76}


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no x": ({"images": noise(1, 4, 4), "y": np.array([0])}, r"needs arrays x and y.*images"),
    "no y": ({"x": noise(1, 4, 4, 3)}, "needs arrays x and y"),
    "floats": ({"x": np.zeros((1, 4, 4, 3)), "y": np.array([0])}, r"float64 \[1, 4, 4, 3\]"),
    "channels first": ({"x": noise(1, 3, 16, 16), "y": np.array([0])}, r"\[1, 3, 16, 16\]"),
    "two channels": ({"x": noise(1, 4, 4, 2), "y": np.array([0])}, "1, 3 or 4 channels"),
    "one image": ({"x": noise(4, 4), "y": np.array([0])}, r"\[N, H, W\]"),
    "no images": ({"x": noise(0, 4, 4, 3), "y": np.zeros(0, int)}, "holds no images"),
    "no pixels": ({"x": noise(2, 0, 4, 3), "y": np.array([0, 1])}, "holds no images"),
    "fewer labels": ({"x": noise(2, 4, 4), "y": np.array([0])}, r"int64 \[1\]; expected 2"),
    "labels of two axes": ({"x": noise(2, 4, 4), "y": np.zeros((2, 1), int)}, "expected 2"),
    "labels of floats": ({"x": noise(2, 4, 4), "y": np.zeros(2)}, "float64"),
    "a label too high": ({"x": noise(2, 4, 4), "y": np.array([0, 5])}, r"0 to 5.*5 classes"),
    "a label below 0": ({"x": noise(2, 4, 4), "y": np.array([-1, 0])}, r"-1 to 0.*0 to 4"),
    "objects": ({"x": np.array([None]), "y": np.array([0])}, "cannot be read"),
}


@pytest.mark.parametrize(("arrays", "named"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_do_not_fit_are_refused(
    arrays: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = save_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=named) as caught:
        opened(path)
    assert "a.npz" in str(caught.value)


def npz_bytes(compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, x=noise(2, 8, 8, 3), y=np.array([0, 1]))
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, noise(2, 8, 8, 3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"PK\x03\x04", npz_bytes()[:200], npz_bytes()[:-30], npy_bytes()],
    ids=["empty", "text", "start", "cut", "end cut off", "npy"],
)
def test_a_file_that_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz' cannot be read"):
        opened(tmp_path / "a.npz")


@pytest.mark.parametrize("compressed", [False, True])
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_damaged_bytes_give_images_or_a_data_error(
    compressed: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(npz_bytes(compressed))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(bytes(content))
    try:
        source = opened(path)
    except DataError:
        return
    assert source.pixels(0).shape == (16, 16, 3)


# ---- places


@pytest.mark.parametrize("labeled", [True, False])
def test_data_that_is_not_there_is_named(labeled: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing' does not exist; give an image folder"):
        opened(tmp_path / "nothing", labeled=labeled)


@pytest.mark.parametrize("name", ["x.png", "x.csv", "x.NPZ.txt", "x"])
def test_a_file_of_another_type_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="has an unknown type"):
        opened(tmp_path / name)


@pytest.mark.parametrize(
    "changes", [{"num_classes": 5, "in_channels": 1}, {"num_classes": 10}], ids=str
)
def test_the_demos_images_are_for_its_model(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"10 classes and 1 channel"):
        opened("demo", dataclasses.replace(ARCH, **changes))


def test_the_demo_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slice_ = save_npz(tmp_path / "slice.npz", x=noise(3, 28, 28), y=np.arange(3))
    monkeypatch.setattr(demo, "TEST_SLICE", slice_)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("")
    source = opened("demo", dataclasses.replace(GRAY, num_classes=10))
    assert (source.name, len(source)) == ("demo", 3)


@pytest.mark.parametrize("name", ["demo", "./demo", Path("demo")], ids=repr)
def test_a_folder_of_that_name_wins_over_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "demo", ["a", "b"])
    assert len(opened(name, dataclasses.replace(GRAY, num_classes=2))) == 4


# ---- sizes


def sized(height: int, width: int) -> Architecture:
    return dataclasses.replace(ARCH, image_size=(height, width))


def cropped(
    image: Image.Image, height: int, width: int, share: float, how: Any = "bicubic"
) -> np.ndarray:
    preprocessing = dataclasses.replace(PREPROCESSING, crop_pct=share, interpolation=how)
    return fit(image, sized(height, width), preprocessing, crop=True)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.floats(0.5, 1.0),
    crop=st.booleans(),
)
def test_every_image_comes_out_at_the_models_size(
    size: tuple[int, int], target: tuple[int, int], share: float, crop: bool
) -> None:
    preprocessing = dataclasses.replace(PREPROCESSING, crop_pct=share)
    pixels = fit(Image.new("RGB", size), sized(*target), preprocessing, crop=crop)
    assert pixels.shape == (*target, 3)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    x = noise(16, 16, 3)
    assert np.array_equal(cropped(Image.fromarray(x), 16, 16, 1.0), x)


def test_the_center_is_kept() -> None:
    x = np.zeros((20, 20, 3), dtype=np.uint8)
    x[2:-2, 2:-2] = noise(16, 16, 3)
    assert np.array_equal(cropped(Image.fromarray(x), 16, 16, 0.8), x[2:-2, 2:-2])


def test_the_longer_side_is_cropped() -> None:
    x = noise(16, 32, 3)
    assert np.array_equal(cropped(Image.fromarray(x), 16, 16, 1.0), x[:, 8:24])


def test_an_interpolation_that_timm_draws_at_random_is_bicubic() -> None:
    import timm

    overlay = {"interpolation": "random"}
    model = timm.create_model("test_vit", img_size=32, pretrained_cfg_overlay=overlay)
    preprocessing = load_model(model).preprocessing
    assert (preprocessing.interpolation, preprocessing.crop_mode) == ("bicubic", "center")


def timms(image: Image.Image, side: int, share: float, how: str, mode: str) -> np.ndarray:
    transform = create_transform(
        (3, side, side), interpolation=how, crop_pct=share, crop_mode=mode, mean=(0,) * 3,
        std=(1,) * 3,
    )  # fmt: skip
    return (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("share", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [(50, 40), (41, 63), (37, 37), (20, 90)], ids=str)
def test_files_are_cropped_as_timm_crops_them(size: tuple[int, int], share: float) -> None:
    image = Image.fromarray(noise(*size, 3))
    expected = timms(image, 32, share, "bicubic", "center")
    np.testing.assert_array_equal(cropped(image, 32, 32, share), expected)


@pytest.mark.parametrize("share", [0.9, 0.95, 1.0])
def test_a_model_that_timm_gives_squashed_images_gets_them(tmp_path: Path, share: float) -> None:
    import timm

    config = {"crop_mode": "squash", "crop_pct": share}
    model = timm.create_model("test_vit", img_size=32, pretrained_cfg_overlay=config)
    loaded = load_model(model)
    image = Image.fromarray(noise(40, 60, 3))
    image.save(tmp_path / "x.png")
    source = open_images(tmp_path, loaded.vit.arch, loaded.preprocessing, labeled=False)
    expected = timms(image, 32, share, loaded.preprocessing.interpolation, "squash")
    np.testing.assert_array_equal(source.pixels(0), expected)


# ---- batches


def test_batches_are_normalized_per_channel(tmp_path: Path) -> None:
    x = noise(3, 16, 16, 3)
    source = opened(save_npz(tmp_path / "a.npz", x=x, y=np.array([2, 0, 1])))
    ((images, labels),) = load_batches(source, PREPROCESSING, 8)
    expected = (x / 255.0 - PREPROCESSING.mean) / PREPROCESSING.std
    assert labels is not None
    assert labels.tolist() == [2, 0, 1]
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_hold_every_image_once(size: int, lengths: list[int], tmp_path: Path) -> None:
    source = opened(save_npz(tmp_path / "a.npz", x=noise(5, 16, 16, 3), y=np.arange(5)))
    batches = [
        labels for _, labels in load_batches(source, PREPROCESSING, size) if labels is not None
    ]
    assert [len(labels) for labels in batches] == lengths
    assert torch.cat(batches).tolist() == [0, 1, 2, 3, 4]


def dense(tmp_path: Path, count: int, limit: int, arch: Architecture = ARCH) -> DenseImages:
    x = noise(count, *arch.image_size, 3)
    source = opened(save_npz(tmp_path / "a.npz", x=x), arch, labeled=False)
    return DenseImages(source, arch, limit)


@pytest.mark.parametrize(("count", "limit", "expected"), [(10, 4, 4), (3, 8, 3), (5, 5, 5)])
def test_calibration_takes_at_most_as_many_images(
    count: int, limit: int, expected: int, tmp_path: Path
) -> None:
    images = dense(tmp_path, count, limit)
    assert len(images) == expected
    assert sum(len(batch) for batch in images.batches(2)) == expected


def test_calibration_images_are_spread_over_the_source(tmp_path: Path) -> None:
    (batch,) = dense(tmp_path, 10, 5).batches(8)
    images = unpatchify(batch.patches, batch.positions, ARCH.grid)
    assert np.array_equal(images.permute(0, 2, 3, 1), noise(10, 16, 16, 3)[::2])
    assert batch.trajectory.tolist() == [0, 1, 2, 3, 4]


def test_calibration_images_have_all_their_patches(tmp_path: Path) -> None:
    (batch,) = dense(tmp_path, 2, 2).batches(8)
    assert batch.positions.tolist() == [list(range(16))] * 2
    images = unpatchify(batch.patches, batch.positions, ARCH.grid)
    assert np.array_equal(images.permute(0, 2, 3, 1), noise(2, 16, 16, 3))


def test_calibration_leaves_out_pixels_beyond_the_last_whole_patch(tmp_path: Path) -> None:
    arch = describe(make_vit(img_size=18), "tiny")
    (batch,) = dense(tmp_path, 1, 1, arch).batches(8)
    image = unpatchify(batch.patches, batch.positions, arch.grid)[0].permute(1, 2, 0)
    assert np.array_equal(image, noise(1, 18, 18, 3)[0, :16, :16])


def test_calibration_images_carry_labels_where_there_are_some(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=noise(3, 16, 16, 3), y=np.array([3, 1, 2]))
    (batch,) = DenseImages(opened(path, labeled=False), ARCH, 3).batches(8)
    assert batch.labels.tolist() == [3, 1, 2]


def test_an_image_too_thin_to_crop_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (60000, 1)).save(tmp_path / "thin.png")
    source = open_images(tmp_path, sized(224, 224), PREPROCESSING, labeled=False)
    with pytest.raises(DataError, match=r"60000 x 1 pixels are too thin"):
        source.pixels(0)
