"""The public surface, as one list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from surface import surface

import dfq

every_name = pytest.mark.parametrize("name", dfq.__all__)


def test_the_public_surface_is_the_listed_one() -> None:
    """tests/surface.py says how to write the list again."""
    assert surface() == Path(__file__).with_name("surface.txt").read_text()


@every_name
def test_every_public_name_can_be_used(name: str) -> None:
    assert getattr(dfq, name) is not None


@every_name
def test_every_public_name_is_listed(name: str) -> None:
    assert name in dir(dfq)


@pytest.mark.parametrize("name", [n for n in dfq.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(dfq, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dfq' has no attribute 'quantise'"):
        _ = dfq.quantise


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["dfq", "dfq.cli.app"])
def test_importing_loads_neither_torch_nor_timm(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'timm', 'numpy'}} & set(sys.modules)))"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", ["UsageError", "RunError", "GateError"])
def test_every_error_is_a_dfq_error(name: str) -> None:
    assert issubclass(getattr(dfq, name), dfq.DfqError)
