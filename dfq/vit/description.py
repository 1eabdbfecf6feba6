"""The description of a model that timm saved: its ``config.json``, in a folder or on the hub.

``architecture`` is timm's name; ``model_args`` are keywords of ``timm.create_model``;
``pretrained_cfg`` is timm's data config and facts about the weights, which older descriptions hold
at the top.  timm takes the fields as they are, so those that dfq relies on are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import timm

from dfq.errors import UnknownModelError, nearest
from dfq.files import read_json
from dfq.vit.architecture import LARGEST, CropMode, Interpolation
from dfq.vit.preprocessing import CROP_SHARES
from dfq.vit.sizes import BOUNDS, MAX_SIDE, SIZES, size_problem

LARGEST_ARGUMENT = 1 << 20
"""Largest magnitude of a number among the arguments of a model."""

Check = tuple[Callable[[Any], bool], str]


def _numbers(value: Any, least: float, most: float, *, whole: bool) -> bool:
    kinds = (int,) if whole else (int, float)
    return isinstance(value, list | tuple) and all(
        type(v) in kinds and least <= v <= most and math.isfinite(v) for v in value
    )


def _channels(value: Any) -> bool:
    return _numbers(value, -LARGEST, LARGEST, whole=False) and 0 < len(value) <= 1024


def _input_size(value: Any) -> bool:
    return _numbers(value, 1, MAX_SIDE, whole=True) and len(value) == 3


def _one_of(choices: tuple[str, ...]) -> Check:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


_CHANNELS: Check = (_channels, "a list of 1 to 1024 numbers, one a channel")
_INPUT_SIZE: Check = (_input_size, f"channels, height and width, each from 1 to {MAX_SIDE}")

_FIELDS: dict[str, Check] = {
    "mean": _CHANNELS,
    "std": _CHANNELS,
    "crop_pct": (
        lambda value: type(value) in (int, float) and CROP_SHARES[0] <= value <= CROP_SHARES[1],
        f"a number from {CROP_SHARES[0]} to {CROP_SHARES[1]}",
    ),
    "interpolation": _one_of((*get_args(Interpolation), "random")),
    "crop_mode": _one_of(get_args(CropMode)),
    "input_size": _INPUT_SIZE,
    "test_input_size": _INPUT_SIZE,
    "min_input_size": _INPUT_SIZE,
    "fixed_input_size": (lambda value: type(value) is bool, "true or false"),
    "global_pool": (lambda value: isinstance(value, str), "a string"),
}
"""Fields of ``pretrained_cfg`` that dfq relies on: their check, and what is allowed."""


def check_description(path: Path, name: str) -> None:
    """Check the ``config.json`` of the model ``name``.  Fields that are null count as absent.

    Raises:
        UnknownModelError: it is no description of a timm model, or a field is malformed.
        OSError: it cannot be read.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise UnknownModelError(
            f"{name!r} is no model that timm saved: its {path.name} is no valid JSON ({error})."
        ) from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise UnknownModelError(
            f"{name!r} has no description of a timm model in its {path.name} ('architecture' is "
            "missing); models of Transformers are not taken. Look for the same model in "
            "`dfq models`."
        )
    _check_architecture(config["architecture"], name)
    arguments = config.get("model_args", {})
    data = config.get("pretrained_cfg", config)
    for field, value in (("model_args", arguments), ("pretrained_cfg", data)):
        if not isinstance(value, dict):
            raise _malformed(name, field, value, "an object")
    for key, value in arguments.items():
        _check_argument(key, value, name)
    problem = data_problem(data)
    if problem is not None:
        raise _malformed(name, *problem)
    for field, where in (("num_classes", config), ("num_classes", data)):
        if where.get(field) is not None and (allowed := size_problem(field, where[field])):
            raise _malformed(name, field, where[field], allowed)


def _check_architecture(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise _malformed(name, "architecture", value, "a name of timm's")
    if not timm.is_model(value):
        raise UnknownModelError(
            f"{name!r} has the architecture {value!r:.80}, which is no model of timm "
            f"{timm.__version__}.{nearest(value[:80], timm.list_models('*vit*'))}"
        )


def _check_argument(key: str, value: Any, name: str) -> None:
    if value is None:
        return
    if key in BOUNDS or key in SIZES:
        problem = size_problem(key, value)
    else:
        problem = None if _is_small(value) else f"made of numbers up to {LARGEST_ARGUMENT}"
    if problem is not None:
        raise _malformed(name, f"model_args.{key}", value, problem)


def _is_small(value: Any) -> bool:
    """Whether all numbers within a JSON value have a magnitude of at most LARGEST_ARGUMENT."""
    if isinstance(value, dict | list):
        return all(map(_is_small, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST_ARGUMENT


def data_problem(data: dict[str, Any]) -> tuple[str, Any, str] | None:
    """Return a malformed field of a data config, its value and what is allowed; None if all are
    well-formed."""
    given = {field: data[field] for field in _FIELDS if data.get(field) is not None}
    for field, value in given.items():
        valid, allowed = _FIELDS[field]
        if not valid(value):
            return field, value, allowed
    for field, other in (("mean", "std"), ("std", "mean")):
        if field in given and other not in given:
            return other, None, f"given beside {field}"
    return None


def _malformed(name: str, field: str, value: Any, allowed: str) -> UnknownModelError:
    return UnknownModelError(
        f"{name!r}: {field} in its config.json is {value!r:.80}; it must be {allowed}."
    )
