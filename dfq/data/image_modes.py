"""Conversion of images in any Pillow mode to 8-bit gray, RGB or RGBA."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF 6.0."""

WHITE_IS_ZERO, UNSIGNED = 0, 1
"""Values of the tags PHOTOMETRIC and SAMPLE_FORMAT."""

SCALED_TO_16 = ("JPEG2000", "PNG", "PPM")
"""Formats whose gray samples Pillow scales to 0..65535, whatever the depth of the file."""

_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""Modes with premultiplied alpha -> the modes without."""

_BY_RGB = ("CMYK", "HSV", "LAB", "RGBX", "YCbCr")
"""Color modes that are converted by way of RGB, because Pillow has no direct conversion."""


def to_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to mode ``L``, ``RGB`` or ``RGBA``, with black at 0 and white at 255.

    If ``mode`` has no alpha channel, alpha is dropped, not blended, as in timm.  16-bit samples
    are reduced to their high byte, as Pillow does for RGB.

    Raises:
        ValueError: the file does not define its values of black and white.
    """
    _check_unsigned(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_deep(image)
    image = image.convert(_STRAIGHT.get(image.mode, image.mode))
    if image.mode in _BY_RGB:
        image = image.convert("RGB")
    return image.convert(mode)


def _from_deep(image: Image.Image) -> Image.Image:
    bits = _depth(image)
    if bits is None:
        kind = {"I": "32-bit whole numbers", "F": "floating-point numbers"}.get(image.mode, "")
        raise ValueError(
            f"its samples are {kind or image.mode} (Pillow's mode {image.mode}, format "
            f"{image.format}), for which the format defines no white; save it with 8 or 16 bits"
        )
    high = (np.asarray(image).astype(np.uint32) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - high if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO else high)


def _depth(image: Image.Image) -> int | None:
    """Return the bits of a gray sample; None if white is not the largest value of these bits."""
    if image.mode == "F":
        return None
    if image.format in SCALED_TO_16:
        return 16
    bits = _tag(image, BITS_PER_SAMPLE)
    return None if bits is None or image.mode == "I" else int(bits)


def _check_unsigned(image: Image.Image) -> None:
    formats = _tag(image, SAMPLE_FORMAT)
    if image.mode not in ("I", "F") and formats not in (None, UNSIGNED):
        raise ValueError("its samples have a sign, so that no value of them is black or white")


def _tag(image: Image.Image, tag: int) -> Any:
    """Return the (first) value of a TIFF tag, or None."""
    tags = getattr(image, "tag_v2", None)
    value = None if tags is None else tags.get(tag)
    return value[0] if isinstance(value, tuple) and value else value
