"""Arguments of the public functions are refused by name and type."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dfq
from dfq.arguments import checked, fits
from dfq.errors import DfqError, SettingError
from dfq.progress import Progress, Silent


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int | None),
        (None, int | None),
        (np.float64(3), float),
        (3, float),
        ("a", str | Path),
        (Path("a"), str | Path),
        ([0.5, 1], Sequence[float]),
        ((0.5,), Sequence[float] | None),
        ({"a": {"b": 3}}, dict[str, dict[str, Any]]),
        (b"", Any),
    ],
    ids=str,
)
def test_values_that_fit(value: Any, hint: Any) -> None:
    assert fits(value, hint)


def test_a_protocol_is_what_has_its_methods() -> None:
    assert fits(Silent(), Progress | None)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("3", int | None),
        (True, int),
        (True, float),
        (3.0, int),
        (np.int64(3), int),
        (5, Progress | None),
        ({1: {}}, dict[str, dict[str, Any]]),
        (3, str | Path),
        ("ab", Sequence[str]),
        (np.zeros(3), Sequence[float]),
        (["a"], Sequence[float]),
        ({"a": 3}, dict[str, dict[str, Any]]),
        ([], dict[str, Any]),
        (1, bool),
    ],
    ids=str,
)
def test_values_that_do_not_fit(value: Any, hint: Any) -> None:
    assert not fits(value, hint)


def test_a_refusal_says_what_arrived_and_what_is_taken() -> None:
    @checked
    def function(size: int, place: str | Path | None = None) -> int:
        return size if place is None else 0

    assert function(3) == 3
    with pytest.raises(SettingError, match=r"size is 'x', of type str; it takes int\."):
        function("x")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"of type int; it takes str, Path or None\."):
        function(3, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="function"):
        function(3, other=4)  # type: ignore[call-arg]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("quantize", {"model": None}),
    ("quantize", {"model": 3}),
    ("quantize", {"model": []}),
    ("quantize", {"model": "demo", "bits": "4"}),
    ("quantize", {"model": "demo", "out": 3}),
    ("quantize", {"model": "demo", "calibration": 3}),
    ("quantize", {"model": "demo", "weights": 3}),
    ("quantize", {"model": "demo", "recipe": {}}),
    ("quantize", {"model": "demo", "settings": {"inversion": 3}}),
    ("quantize", {"model": "demo", "settings": {1: {}}}),
    ("quantize", {"model": "demo", "progress": 5}),
    ("write_dataset", {"out": "x", "units": 5, "model": None, "origin": "photos"}),
    ("quantize", {"model": "demo", "mean": "a"}),
    ("quantize", {"model": "demo", "num_classes": "a"}),
    ("quantize", {"model": "demo", "min_agreement": "a"}),
    ("quantize", {"model": "demo", "iterations": 4.5}),
    ("invert", {"model": "demo", "threads": "2"}),
    ("evaluate", {"path": "x", "data": np.zeros(3)}),
    ("load", {"path": None}),
    ("load_model", {"model": 3}),
    ("export", {"checkpoint": "x", "out": 3}),
    ("preview", {"dataset": "x", "out": "x.png", "rows": "a"}),
    ("distill", {"teacher": "demo", "depth": "a"}),
    ("distill", {"teacher": "demo", "student": 3}),
    ("benchmark", {"checkpoint": "x", "batch": 1}),
    ("benchmark", {"checkpoint": "x", "runtimes": "dfq"}),
    ("inspect", {"path": 3}),
    ("models", {"pattern": 3}),
    ("load_recipe", {"path": 3}),
    ("list_cache", {"cache": 3}),
]


@pytest.mark.parametrize(("name", "arguments"), WRONG, ids=str)
def test_a_wrong_type_is_a_dfq_error(
    name: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DfqError, match=r"is .*, of type .*; it takes "):
        getattr(dfq, name)(**arguments)
    assert not list(tmp_path.iterdir())


def test_every_public_function_checks_its_arguments() -> None:
    functions = [n for n in dfq.__all__ if inspect.isfunction(getattr(dfq, n))]
    assert functions
    assert all(hasattr(getattr(dfq, name), "__wrapped__") for name in functions)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "calibration is empty; leave it out"),
        ("a\0b", "holds a null character"),
        (Path("a\0b"), "holds a null character"),
        ("x" * 300, "with a name of 300 bytes; files and models have at most 255"),
        ("images/" + "ü" * 128, "with a name of 256 bytes"),
    ],
    ids=["empty", "null", "null in a path", "long", "long in bytes"],
)
def test_text_that_names_nothing_is_refused(value: str | Path, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        dfq.quantize("demo", calibration=value)
