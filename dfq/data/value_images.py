"""Images given as floating-point values in the input range instead of 8-bit pixels."""

from __future__ import annotations

import numpy as np

from dfq.argument_names import option
from dfq.errors import DataError
from dfq.vit import Architecture, Preprocessing


def check_pixels(preprocessing: Preprocessing, name: str) -> None:
    """Raise :class:`DataError` if the model does not take 8-bit pixels."""
    if not preprocessing.takes_pixels:
        low, high = preprocessing.input_range
        raise DataError(
            f"{name!r} holds 8-bit pictures, but the model's input range is {low:g} to {high:g}, "
            "not that of pixels. Give an .npz whose x are floating-point values in that range."
        )


def check_values(
    x: np.ndarray, arch: Architecture, preprocessing: Preprocessing, name: str
) -> None:
    """Raise :class:`DataError` unless floating-point ``x`` are images of the model's size, or
    ``[N, H, W]`` for a model of one channel, with values in its input range."""
    shape = (*arch.image_size, arch.in_channels)
    if x.shape[1:] != shape and (*x.shape[1:], 1) != shape:
        height, width, channels = shape
        raise DataError(
            f"{name!r}: x is {x.dtype} {list(x.shape)}; floating-point values are not resized, so "
            f"they must be [N, {height}, {width}, {channels}]. Pictures are uint8 [N, H, W] or "
            "[N, H, W, C]."
        )
    low, high = preprocessing.input_range
    bad = int(np.count_nonzero(~np.isfinite(x)))
    if bad:
        raise DataError(
            f"{name!r}: x has {bad} values that are NaN or infinite. Remove those images, or mend "
            "what wrote them."
        )
    lowest, highest = (float(v) for v in (x.min(), x.max())) if x.size else (low, high)
    half = (high - low) / 255 / 2
    if not (low - half <= lowest and highest <= high + half):
        raise DataError(
            f"{name!r}: x has values from {lowest:g} to {highest:g}, but the model's input range "
            f"is {low:g} to {high:g}. Give values before normalization; if the model's "
            f"range is another, quantize it with {option('input_range')}."
        )


def to_levels(values: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Round values in the input range, ``[H, W, C]`` or ``[H, W]``, to 256 levels: uint8
    ``[H, W, C]``.  The patch embedding of a quantized model rounds its input the same way.
    """
    low, high = preprocessing.input_range
    levels = np.rint((values.astype(np.float64) - low) / (high - low) * 255)
    image = levels.clip(0, 255).astype(np.uint8)
    return image[..., None] if image.ndim == 2 else image
