"""Overrides of a model's preprocessing, and checks of its values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dfq.argument_names import option, parameter_names
from dfq.errors import CheckpointError, SettingError
from dfq.vit.architecture import PIXEL_RANGE, Preprocessing

LEVELS = 255
"""Number of steps between the lowest and the highest of the 256 input levels."""

SLACK = 0.01
"""Tolerance of the bounds of mean and std, in steps, for rounded decimals."""

MAX_MEAN_DISTANCE = 1000.0
"""Largest distance of the mean from the input range, in units of its width, at which float32 still
distinguishes the 256 levels."""


CROP_SHARES = (0.05, 1)
"""Bounds of ``crop_pct``."""


def override_preprocessing(
    own: Preprocessing,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_range: Sequence[float] | None,
) -> Preprocessing:
    """Return a model's preprocessing with the caller's values in place of its own.

    With another input range than the model's, mean and std default to 0 and 1: values are passed
    to the network as they are.

    Raises:
        SettingError: the result is invalid, or has another number of channels.
    """
    if input_range is not None and len(input_range) != 2:
        raise SettingError(
            f"{option('input_range')} has {len(input_range)} values; give the lowest and the "
            f"highest value before normalization, such as {option('input_range', (0, 255))}."
        )
    span = (
        own.input_range if input_range is None else (float(input_range[0]), float(input_range[1]))
    )
    if span != own.input_range:
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
    result = dataclasses.replace(
        own,
        mean=tuple(map(float, own.mean if mean is None else mean)),
        std=tuple(map(float, own.std if std is None else std)),
        input_range=span,
    )
    for name, values in (("mean", result.mean), ("std", result.std)):
        if len(values) != channels:
            raise SettingError(
                f"The model takes {channels} channels but {option(name)} has {len(values)} values "
                f"({_join(values)}).",
                f"Give {option(name)} {channels} values.",
            )
    problem = preprocessing_problem(result)
    if problem is not None:
        raise SettingError(problem)
    return result


def check_preprocessing(preprocessing: Preprocessing, channels: int) -> None:
    """Raise :class:`CheckpointError` unless it is valid for the number of channels."""
    if {len(preprocessing.mean), len(preprocessing.std)} != {channels}:
        raise CheckpointError(f"preprocessing: mean and std must have {channels} values each.")
    with parameter_names():
        problem = preprocessing_problem(preprocessing)
    if problem is not None:
        raise CheckpointError(f"preprocessing: {problem}")


def preprocessing_problem(preprocessing: Preprocessing) -> str | None:
    """Return what is wrong with a preprocessing, in one or more sentences; None if it is valid.

    Unless mean and std are 0 and 1, the mean must lie in the input range, and the std be at least
    one level and at most the width of the range.
    """
    mean, std = preprocessing.mean, preprocessing.std
    for name, values in (("mean", mean), ("std", std), ("input_range", preprocessing.input_range)):
        if not all(map(math.isfinite, values)):
            return f"{option(name)} must be finite, got {_join(values)}."
    low, high = preprocessing.input_range
    if low >= high or math.isinf(high - low):
        return (
            f"{option('input_range')} is {low:g} to {high:g}; it is the lowest and the "
            "highest value before normalization."
        )
    least, most = CROP_SHARES
    if not least <= preprocessing.crop_pct <= most:
        return f"crop_pct is {preprocessing.crop_pct}; it must be from {least} to {most}."
    return _normalization_problem(preprocessing)


def _normalization_problem(preprocessing: Preprocessing) -> str | None:
    low, high = preprocessing.input_range
    if set(preprocessing.mean) == {0.0} and set(preprocessing.std) == {1.0}:
        if max(map(abs, preprocessing.level_mean)) <= MAX_MEAN_DISTANCE:
            return None
        return f"The input range {low!r} to {high!r} is too narrow for float32 so far from 0."
    names = _out_of_range(preprocessing)
    if not names:
        return None
    unit = ", in units of pixels / 255" if preprocessing.input_range == PIXEL_RANGE else ""
    shown = (f"{option(name)} is {_join(getattr(preprocessing, name))}" for name in names)
    return (
        f"{' and '.join(shown)}. With an input range of {low:g} to {high:g} each mean is from "
        f"{low:g} to {high:g} and each std from {(high - low) / LEVELS:.4g} to {high - low:.4g}"
        f"{unit}. {_hint(preprocessing)}"
    )


def _out_of_range(preprocessing: Preprocessing) -> list[str]:
    """Return which of mean and std are out of bounds for the input range."""
    slack = SLACK / LEVELS
    levels = (
        ("mean", preprocessing.level_mean, 0.0),
        ("std", preprocessing.level_std, 1 / LEVELS),
    )
    return [
        name
        for name, values, least in levels
        if not all(least - slack <= v <= 1 + slack for v in values)
    ]


def _hint(preprocessing: Preprocessing) -> str:
    """Suggest values instead of a mean and std that are out of bounds."""
    names = _out_of_range(preprocessing)
    mean, std = (
        tuple(v / 255 for v in values) if name in names else values
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std))
    )
    divided = dataclasses.replace(preprocessing, mean=mean, std=std)
    if preprocessing.input_range == PIXEL_RANGE and not _out_of_range(divided):
        better = (option(n, [float(f"{v:.4g}") for v in getattr(divided, n)]) for n in names)
        both = f", or {option('input_range', (0, 255))}" if len(names) == 2 else ""
        return f"If they are in units of 0 to 255, give {' and '.join(better)}{both}."
    return (
        "If the network's input is not made from pixels, give the lowest and the highest value "
        f"before normalization with {option('input_range', metavar='LOW,HIGH')}."
    )


def _join(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
