"""The normalisation that a user gives, and whether it can be that of a model's input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dfq.errors import CheckpointError, SettingError
from dfq.vit.architecture import PIXEL_RANGE, Preprocessing

LEVELS = 255
"""Steps between the lowest and the highest of the 256 levels of an input value."""

SLACK = 0.01
"""Share of a step that mean and std may lie beyond their bounds, as decimals are rounded."""

FARTHEST = 1000.0
"""Largest distance of the mean from the input range, in widths of it: float32 then still tells
its 256 levels apart."""


def overridden(
    own: Preprocessing,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_range: Sequence[float] | None,
) -> Preprocessing:
    """A model's own preprocessing with what the caller gave in its place.

    With another input range than the model's, a mean and a std that are left out are 0 and 1:
    values are then given as the network takes them.

    Raises:
        SettingError: the result cannot be carried out, or is not of a model of so many channels.
    """
    if input_range is not None and len(input_range) != 2:
        raise SettingError(
            f"input_range (--input-range) has {len(input_range)} values; give the lowest and the "
            "highest value before normalisation, such as 0,255."
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
                f"The model takes {channels} channels but --{name} has {len(values)} values "
                f"({_listed(values)}).",
                f"Give --{name} {channels} values.",
            )
    problem = preprocessing_problem(result)
    if problem is not None:
        raise SettingError(problem)
    return result


def check_preprocessing(preprocessing: Preprocessing, channels: int) -> None:
    """Raise :class:`CheckpointError` unless it fits so many channels and can be carried out."""
    if {len(preprocessing.mean), len(preprocessing.std)} != {channels}:
        raise CheckpointError(f"preprocessing: mean and std must have {channels} values each.")
    problem = preprocessing_problem(preprocessing)
    if problem is not None:
        raise CheckpointError(f"preprocessing: {problem}")


def preprocessing_problem(preprocessing: Preprocessing) -> str | None:
    """What is wrong with a description of the input, as one or more sentences; None if nothing.

    Mean and std other than 0 and 1 must be those of values in the input range: the mean within
    it, the std from one level to its whole width.
    """
    mean, std = preprocessing.mean, preprocessing.std
    for name, values in (("mean", mean), ("std", std), ("input-range", preprocessing.input_range)):
        if not all(map(math.isfinite, values)):
            return f"{name.replace('-', ' ')} (--{name}) must be finite, got {_listed(values)}."
    low, high = preprocessing.input_range
    if low >= high or math.isinf(high - low):
        return (
            f"The input range (--input-range) is {low:g} to {high:g}; it is the lowest and the "
            "highest value before normalisation."
        )
    if not 0.05 <= preprocessing.crop_pct <= 1:
        return f"crop_pct is {preprocessing.crop_pct}; it must be from 0.05 to 1."
    return _problem_of_normalisation(preprocessing)


def _problem_of_normalisation(preprocessing: Preprocessing) -> str | None:
    low, high = preprocessing.input_range
    if set(preprocessing.mean) == {0.0} and set(preprocessing.std) == {1.0}:
        if max(map(abs, preprocessing.level_mean)) <= FARTHEST:
            return None
        return f"The input range {low!r} to {high!r} is too narrow for float32 so far from 0."
    names = _misfits(preprocessing)
    if not names:
        return None
    unit = ", in units of pixels / 255" if preprocessing.input_range == PIXEL_RANGE else ""
    shown = (f"{name} (--{name}) is {_listed(getattr(preprocessing, name))}" for name in names)
    return (
        f"{' and '.join(shown)}. With an input range of {low:g} to {high:g} each mean is from "
        f"{low:g} to {high:g} and each std from {(high - low) / LEVELS:.4g} to {high - low:.4g}"
        f"{unit}. {_hint(preprocessing)}"
    )


def _misfits(preprocessing: Preprocessing) -> list[str]:
    """Which of mean and std are not of values in the input range."""
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
    """What to give instead of a mean and a std that are not of values in the input range."""
    names = _misfits(preprocessing)
    mean, std = (
        tuple(v / 255 for v in values) if name in names else values
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std))
    )
    divided = dataclasses.replace(preprocessing, mean=mean, std=std)
    if preprocessing.input_range == PIXEL_RANGE and not _misfits(divided):
        flags = (f"--{n} {','.join(f'{v:.4g}' for v in getattr(divided, n))}" for n in names)
        both = ", or --input-range 0,255" if len(names) == 2 else ""
        return f"If they are in units of 0 to 255, give {' '.join(flags)}{both}."
    return (
        "If the network's input is not made from pixels, give the lowest and the highest value "
        "before normalisation with --input-range LOW,HIGH."
    )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
