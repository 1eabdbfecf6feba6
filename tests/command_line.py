"""``dfq`` called in this process, and a checkpoint that it made."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app

MODEL = "test_vit"
"""timm's own test model; it takes a fifth of the time of the smallest real one."""


FAST = ["--iterations", "4", "--images", "4", "--stages", "2", "--threads", "1"]


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class Cli:
    """Runner of commands in this process."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights

    @property
    def model(self) -> list[str]:
        return [MODEL, "--weights", str(self.weights), "--img-size", "32"]

    def __call__(self, *args: str | Path) -> Outcome:
        texts = [str(a) for a in args]
        result = CliRunner().invoke(app, texts)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    def quantize(self, out: Path, *args: str | Path) -> Outcome:
        return self("quantize", *self.model, *FAST, "--out", out, *args)

    def invert(self, *args: str | Path) -> Outcome:
        return self("invert", *self.model, *FAST, *args)


@pytest.fixture
def cli(small_weights: Path) -> Cli:
    return Cli(small_weights)


@pytest.fixture(scope="session")
def cli_checkpoint(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W8A8 checkpoint of the small model."""
    root = tmp_path_factory.mktemp("checkpoint")
    dfq.quantize(
        MODEL,
        weights=small_weights,
        img_size=32,
        images=4,
        settings={"inversion": {"iterations": 4, "stages": 2, "threads": 1}},
        out=root / "w8a8",
        cache=root / "cache",
    )
    return root / "w8a8"


def assert_schema(value: Any, kind: Any) -> None:
    """Assert that ``value`` has a result's fields in order and with their types, recursively."""
    if isinstance(kind, types.UnionType):
        if value is None:
            assert types.NoneType in typing.get_args(kind)
            return
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is list:
        assert type(value) is list
        for item in value:
            assert_schema(item, typing.get_args(kind)[0])
        return
    if not dataclasses.is_dataclass(kind):
        assert type(value) is kind or (kind is float and type(value) is int)
        return
    hints = typing.get_type_hints(kind)
    assert list(value) == [f.name for f in dataclasses.fields(kind)]
    for name, item in value.items():
        assert_schema(item, hints[name])
