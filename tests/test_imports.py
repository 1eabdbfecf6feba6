"""Data flows one way, and so do imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def users_of(module: str, place: str = "dfq") -> set[str]:
    """Files below ``place`` that import a module or anything in it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / place).rglob("*.py")
        if any(name == module or name.startswith(module + ".") for name in imported(path))
    }


@pytest.mark.parametrize(
    ("place", "never"),
    [
        ("dfq", "calibration_bench"),
        ("dfq/inversion", "dfq.quantization"),
        ("dfq/inversion", "dfq.data.dataset"),
        ("dfq/inversion", "dfq.data.settings"),
        ("dfq/quantization", "dfq.inversion"),
        ("dfq/quantization", "dfq.pipeline.quantize"),
        ("dfq/runtime", "dfq.quantization"),
        ("dfq/vit", "dfq.inversion"),
        ("dfq/vit", "dfq.quantization"),
        ("dfq/exporting", "dfq.inversion"),
    ],
)
def test_nothing_imports_what_comes_after_it(place: str, never: str) -> None:
    assert not users_of(never, place)


def test_torch_ao_stays_in_one_module() -> None:
    assert users_of("torch.ao") == {"dfq/quantization/observers.py"}


def test_the_command_line_is_imported_by_nothing_but_its_entry() -> None:
    assert users_of("dfq.cli") == {"dfq/__main__.py", "dfq/cli/app.py"}


def test_only_the_command_line_prints() -> None:
    own = {"dfq/cli/app.py", "dfq/cli/errors.py"}
    assert users_of("dfq.cli.terminal") == own
    assert users_of("dfq.cli.errors") == {"dfq/cli/app.py"}
