"""Conversion of image files of every depth and color mode to 8 bits."""

from __future__ import annotations

import colorsys
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from dfq.data.image_modes import to_eight_bits

RAMP = np.array([[0, 255, 256, 32768, 65279, 65535]], dtype=np.uint16)
HIGH = [0, 0, 1, 128, 254, 255]


def read(path: Path, mode: str = "L") -> list[Any]:
    with Image.open(path) as image:
        array = np.asarray(to_eight_bits(image, mode))
    return array.tolist()[0]


def pgm(path: Path, values: list[int], maxval: int, plain: bool = False) -> Path:
    """A portable gray map, with its samples as the format asks for."""
    head = f"{'P2' if plain else 'P5'}\n{len(values)} 1\n{maxval}\n".encode()
    if plain:
        body = " ".join(map(str, values)).encode() + b"\n"
    else:
        body = np.array(values, dtype=">u2" if maxval > 255 else "u1").tobytes()
    path.write_bytes(head + body)
    return path


def png(path: Path, samples: np.ndarray, color: int) -> Path:
    """A PNG file of 16-bit samples ``[H, W, C]``, which Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = samples.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip
    return path


def tiff(path: Path, samples: np.ndarray, bits: int, order: str = "<", **tags: int) -> Path:
    """An uncompressed TIFF file of one strip; ``samples`` are ``[H, W]`` or ``[H, W, C]``."""
    known = {"photometric": 262, "sample_format": 339, "extra": 338}
    bands = samples.shape[2] if samples.ndim == 3 else 1
    body = samples.tobytes()
    entries = {
        256: (4, samples.shape[1]), 257: (4, samples.shape[0]), 258: (3, bits), 259: (3, 1),
        262: (3, 1), 273: (4, 8), 277: (3, bands), 278: (4, samples.shape[0]),
        279: (4, len(body)),
    }  # fmt: skip
    entries |= {known[name]: (3, value) for name, value in tags.items()}
    at = 8 + len(body) + len(body) % 2
    after = at + 2 + 12 * len(entries) + 4
    late = b""
    ifd = struct.pack(order + "H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        count = bands if tag in (258, 339) else 1
        if count * 2 > 4:
            field = struct.pack(order + "I", after + len(late))
            late += struct.pack(order + f"{count}H", *[value] * count)
        elif kind == 3:
            field = struct.pack(order + f"{count}H", *[value] * count).ljust(4, b"\0")
        else:
            field = struct.pack(order + "I", value)
        ifd += struct.pack(order + "HHI", tag, kind, count) + field
    mark = b"II*\0" if order == "<" else b"MM\0*"
    padded = body.ljust(at - 8, b"\0")
    path.write_bytes(mark + struct.pack(order + "I", at) + padded + ifd + b"\0" * 4 + late)
    return path


# ---- deep gray


def test_a_png_of_16_bits_gives_its_high_bytes(tmp_path: Path) -> None:
    assert read(png(tmp_path / "x.png", RAMP[..., None], 0)) == HIGH


@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_of_16_bits_gives_what_the_png_gives(plain: bool, tmp_path: Path) -> None:
    assert read(pgm(tmp_path / "x.pgm", RAMP[0].tolist(), 65535, plain)) == HIGH


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("maxval", [1, 15, 100, 255, 1000, 1023, 4095, 65535])
def test_maxval_of_a_pgm_is_white(maxval: int, plain: bool, tmp_path: Path) -> None:
    values = [0, maxval // 2, maxval]
    black, middle, white = read(pgm(tmp_path / "x.pgm", values, maxval, plain))
    assert (black, white) == (0, 255)
    assert middle == pytest.approx(values[1] / maxval * 255, abs=1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bits_in_either_byte_order(order: str, tmp_path: Path) -> None:
    assert read(tiff(tmp_path / "x.tif", RAMP.astype(f"{order}u2"), 16, order)) == HIGH


@pytest.mark.parametrize(("bits", "kind"), [(8, "u1"), (16, "<u2")])
def test_a_tiff_whose_white_is_0_is_turned_round(bits: int, kind: str, tmp_path: Path) -> None:
    samples = np.array([[0, 2**bits - 1]]).astype(kind)
    assert read(tiff(tmp_path / "x.tif", samples, bits, photometric=0)) == [255, 0]


def test_a_tiff_of_12_bits_is_white_at_4095(tmp_path: Path) -> None:
    packed = np.array([[0x00, 0x0F, 0xFF]], dtype=np.uint8)  # 0x000 and 0xfff, two samples
    path = tiff(tmp_path / "x.tif", packed, 12)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", 256, 4, 1, 3))
    content[at + 8] = 2
    path.write_bytes(bytes(content))
    assert read(path) == [0, 255]


@pytest.mark.parametrize(
    ("bits", "kind", "format_", "named"),
    [
        (32, "<u4", 1, "32-bit whole numbers.*TIFF.*no white"),
        (32, "<i4", 2, "32-bit whole numbers.*no white"),
        (16, "<i2", 2, "32-bit whole numbers.*no white"),
        (32, "<f4", 3, "floating-point numbers.*no white"),
        (8, "i1", 2, "have a sign"),
    ],
)
def test_a_tiff_without_a_defined_white_is_refused(
    bits: int, kind: str, format_: int, named: str, tmp_path: Path
) -> None:
    path = tiff(tmp_path / "x.tif", np.array([[0, 100]]).astype(kind), bits, sample_format=format_)
    with pytest.raises(ValueError, match=named):
        read(path)


def test_a_float_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ppm").write_bytes(b"Pf\n2 1\n-1.0\n" + np.zeros(2, "<f4").tobytes())
    with pytest.raises(ValueError, match=r"floating-point numbers.*format PPM"):
        read(tmp_path / "x.ppm")


LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
"""Every sample of 16 bits."""


def whole(path: Path, mode: str = "L") -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(to_eight_bits(image, mode))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: png(path / "x.png", LEVELS[..., None], 0),
        lambda path: tiff(path / "x.tif", LEVELS.astype("<u2"), 16, "<"),
        lambda path: tiff(path / "x.tif", LEVELS.astype(">u2"), 16, ">"),
        lambda path: pgm(path / "x.pgm", LEVELS.flatten().tolist(), 65535),
        lambda path: pgm(path / "x.pgm", LEVELS.flatten().tolist(), 65535, plain=True),
    ],
    ids=["PNG", "TIFF", "TIFF, high bytes first", "PGM", "PGM in text"],
)
def test_every_sample_of_16_bits_gives_its_high_byte(
    write: Callable[[Path], Path], mode: str, tmp_path: Path
) -> None:
    actual = whole(write(tmp_path), mode).reshape(65536, -1)
    expected = np.repeat(np.floor(np.arange(65536) / 256)[:, None], actual.shape[1], axis=1)
    expected[:, 3:] = 255
    np.testing.assert_array_equal(actual, expected)


def test_every_sample_of_16_bits_is_turned_round_where_white_is_0(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", LEVELS.astype("<u2"), 16, photometric=0)
    np.testing.assert_array_equal(whole(path), 255 - np.floor(LEVELS / 256))


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow is built without JPEG 2000")
def test_every_sample_of_a_jpeg_2000_gives_its_high_byte(tmp_path: Path) -> None:
    Image.fromarray(LEVELS).save(tmp_path / "x.jp2", irreversible=False)
    np.testing.assert_array_equal(whole(tmp_path / "x.jp2"), np.floor(LEVELS / 256))


def test_every_sample_of_12_bits_gives_its_high_byte(tmp_path: Path) -> None:
    levels = np.arange(4096).reshape(64, 64)
    even, odd = levels[:, ::2], levels[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2)
    path = tiff(tmp_path / "x.tif", packed.reshape(64, 96).astype(np.uint8), 12)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", 256, 4, 1, 96))
    content[at + 8] = 64
    path.write_bytes(bytes(content))
    np.testing.assert_array_equal(whole(path), np.floor(levels / 16))


@given(maxval=st.integers(1, 65535), data=st.data(), plain=st.booleans())
def test_samples_of_any_maxval_are_scaled_and_rounded(
    maxval: int, data: st.DataObject, plain: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = data.draw(st.lists(st.integers(0, maxval), min_size=1, max_size=8))
    path = pgm(tmp_path_factory.getbasetemp() / "x.pgm", values, maxval, plain)
    scaled = np.array(values) / maxval
    levels = np.rint(scaled * 255) if maxval <= 255 else np.rint(scaled * 65535) // 256
    assert read(path) == levels.tolist()


# ---- 16 bits of color, which Pillow reduces itself


def test_a_png_of_16_bits_and_colors(tmp_path: Path) -> None:
    samples = np.stack([RAMP, RAMP[:, ::-1], RAMP], axis=2)
    expected = np.stack([HIGH, HIGH[::-1], HIGH], axis=1).tolist()
    assert read(png(tmp_path / "x.png", samples, 2), "RGB") == expected


def test_a_png_of_16_bits_and_transparency_loses_that_alone(tmp_path: Path) -> None:
    samples = np.stack([RAMP, np.full_like(RAMP, 1000)], axis=2)
    assert read(png(tmp_path / "x.png", samples, 4)) == HIGH


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bits_and_colors(order: str, tmp_path: Path) -> None:
    samples = np.stack([RAMP, RAMP[:, ::-1], RAMP], axis=2).astype(f"{order}u2")
    path = tiff(tmp_path / "x.tif", samples, 16, order, photometric=2)
    assert read(path, "RGB") == np.stack([HIGH, HIGH[::-1], HIGH], axis=1).tolist()


def test_a_ppm_of_16_bits_is_scaled_by_its_maxval(tmp_path: Path) -> None:
    body = np.array([0, 500, 1000], dtype=">u2").tobytes()
    (tmp_path / "x.ppm").write_bytes(b"P6\n1 1\n1000\n" + body)
    assert read(tmp_path / "x.ppm", "RGB") == [[0, 128, 255]]


# ---- modes of 8 bits

DEEP = ["I", "F", "I;16", "I;16B", "I;16L", "I;16N"]


def test_every_mode_of_pillows_is_tested_here() -> None:
    assert {*DEEP, *WHITE, "P", "PA"} >= set(Image.MODES)


WHITE: dict[str, Any] = {
    "1": 1, "L": 255, "LA": (255, 255), "RGB": (255,) * 3, "RGBA": (255,) * 4,
    "RGBX": (255,) * 4, "CMYK": (0,) * 4, "YCbCr": (255, 128, 128), "HSV": (0, 0, 255),
    "LAB": (255, 128, 128), "La": (255, 255), "RGBa": (255,) * 4,
}  # fmt: skip


BLACK: dict[str, Any] = {
    "1": 0, "L": 0, "LA": (0, 255), "RGB": (0,) * 3, "RGBA": (0, 0, 0, 255),
    "RGBX": (0, 0, 0, 255), "CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "HSV": (0, 0, 0),
    "LAB": (0, 128, 128), "La": (0, 255), "RGBa": (0, 0, 0, 255),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("source", WHITE)
def test_black_and_white_of_every_mode(source: str, mode: str) -> None:
    for values, level in ((WHITE, 255), (BLACK, 0)):
        actual = np.asarray(to_eight_bits(Image.new(source, (1, 1), values[source]), mode))
        expected = np.full_like(actual, level)
        expected[..., 3:] = 255
        np.testing.assert_allclose(actual, expected, atol=1 if source == "LAB" else 0)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(("mode", "expected"), [("L", [18]), ("RGB", [10, 20, 30])])
def test_palettes_give_their_colors(alpha: bool, mode: str, expected: list[int]) -> None:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    actual = to_eight_bits(image.convert("PA") if alpha else image, mode)
    assert np.asarray(actual).flatten().tolist() == expected


@pytest.mark.parametrize(("mode", "value"), [("La", (100, 128)), ("RGBa", (100, 100, 100, 128))])
def test_premultiplied_colors_are_divided_by_their_transparency(
    mode: str, value: tuple[int, ...]
) -> None:
    actual = np.asarray(to_eight_bits(Image.new(mode, (1, 1), value), "L"))
    assert int(actual[0, 0]) == pytest.approx(100 * 255 / 128, abs=1)


@pytest.mark.parametrize("mode", DEEP)
def test_deep_images_of_no_format_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="defines no white; save it with 8 or 16 bits"):
        to_eight_bits(Image.new(mode, (1, 1)), "L")


def colors(mode: str, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """An image of random samples, and these as floats ``[N, C]``."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    samples = np.random.default_rng(seed).integers(0, 256, (64, 64, bands), dtype=np.uint8)
    image = Image.frombytes(mode, (64, 64), samples.tobytes())
    return image, samples.reshape(-1, bands).astype(float)


def of_cmyk(c: np.ndarray) -> np.ndarray:
    white = 255 - c[:, 3:]
    return white - white * c[:, :3] / 255


def of_ycbcr(c: np.ndarray) -> np.ndarray:
    """JFIF 1.02, without the rounding."""
    y, blue, red = c[:, 0], c[:, 1] - 128, c[:, 2] - 128
    return np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], 1)


def of_hsv(c: np.ndarray) -> np.ndarray:
    return 255 * np.array([colorsys.hsv_to_rgb(*row) for row in c / 255])


RGB_OF: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "L": lambda c: np.repeat(c, 3, axis=1),
    "LA": lambda c: np.repeat(c[:, :1], 3, axis=1),
    "RGB": lambda c: c,
    "RGBA": lambda c: c[:, :3],
    "RGBX": lambda c: c[:, :3],
    "CMYK": of_cmyk,
    "YCbCr": of_ycbcr,
    "HSV": of_hsv,
}


@pytest.mark.parametrize("source", RGB_OF)
def test_colors_of_every_mode_are_those_of_its_formula(source: str) -> None:
    image, samples = colors(source)
    rgb = np.clip(RGB_OF[source](samples), 0, 255)
    exact = source not in ("CMYK", "YCbCr", "HSV")
    actual = np.asarray(to_eight_bits(image, "RGB")).reshape(-1, 3)
    np.testing.assert_allclose(actual, rgb, atol=0 if exact else 1)
    gray = rgb @ [0.299, 0.587, 0.114]  # ITU-R 601-2
    np.testing.assert_allclose(
        np.asarray(to_eight_bits(image, "L")).flatten(), gray, atol=0.51 if exact else 1.6
    )
