"""The layout of ``tests/``: the directories of ``dfq``, and no long files."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
MAX_LINES = 500


def test_no_file_of_tests_is_too_long() -> None:
    lines = {str(p.relative_to(TESTS)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_directories_of_tests_are_those_of_the_package() -> None:
    places = {p.relative_to(TESTS).parts[0] for p in FILES if p.parent != TESTS}
    known = {p.name for p in (TESTS.parent / "dfq").iterdir() if (p / "__init__.py").is_file()}
    assert places - {"bench", "emulated"} <= known


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest and mypy know them by the name alone."""
    names = [p.stem for p in FILES]
    assert sorted({n for n in names if names.count(n) > 1}) == []
