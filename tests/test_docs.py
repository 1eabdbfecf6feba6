"""Documentation and code name the same things."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import typer.main
from test_imports import MAY

import dfq
from dfq.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


INSTALLS = (["--install-completion"], ["--show-completion"])
"""Flags whose callbacks act while the command line is parsed."""


def commands() -> list[str]:
    spans = [s for p in PAGES for s in re.findall(r"`+([^`]+)`+", p.read_text())]
    lines = [line for span in spans for line in span.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({p.split(" > ")[0] for p in parts if p.startswith("dfq ")})


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documentation_parse(command: str) -> None:
    current: Any = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    while hasattr(current, "commands") and words and words[0] in current.commands:
        current = current.commands[words.pop(0)]
    if words or not hasattr(current, "commands"):
        words = [w for w in words if not w.isupper()] if "|" in command else words
        required = [p for p in current.params if p.required]
        if words or not required:
            if words in INSTALLS:  # they act as soon as they are parsed, on the user's home
                assert words[0] in [flag for p in current.params for flag in p.opts]
                return
            current.make_context("dfq", words)


def test_the_readme_names_every_command() -> None:
    root: Any = typer.main.get_command(app)
    for name in root.commands:
        assert f"dfq {name}" in README


def tree() -> dict[str, set[str]]:
    """Names of the README's tree by folder; names may be patterns."""
    folders: dict[str, set[str]] = {"": set()}
    folder = ""
    for line in README[README.index("\n.ci/\n") + 1 :].partition("\n```")[0].splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        if not line.startswith("  "):
            folder = names[0] if names and names[0].endswith("/") else ""
        if line.startswith("  ") or not folder:
            folders.setdefault(folder, set()).update(names)
    return folders


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_tree_of_the_readme_names_every_file_of_two_levels() -> None:
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a checkout")
    there: dict[str, set[str]] = {}
    for name in git.stdout.splitlines():
        first, _, rest = name.partition("/")
        second, below, _ = rest.partition("/")
        there.setdefault(f"{first}/" if rest else "", set()).add(second + below if rest else first)
    named = tree()
    for folder, names in there.items():
        for name in names:
            assert any(fnmatchcase(name, pattern) for pattern in named[folder]), folder + name
        for pattern in named[folder]:
            assert any(fnmatchcase(name, pattern) for name in names), folder + pattern


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_functions_in_the_documentation_exist(page: Path) -> None:
    for name in re.findall(r"`?dfq\.([a-z_]+)\(", page.read_text()):
        assert name in dfq.__all__


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def listed(room: str) -> set[str]:
    """Modules and folders that the architecture page lists in a room, or beside the rooms."""
    section = ARCHITECTURE.partition(f"\n### dfq/{room}\n")[2].partition("\n#")[0]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", section, re.M))
    return set(re.findall(r"`(\w+\.py|\w+/)`", cells))


def test_the_architecture_page_lists_every_module_in_its_room() -> None:
    rooms: dict[str, set[str]] = {}
    for path in (ROOT / "dfq").rglob("*.py"):
        parts = path.relative_to(ROOT / "dfq").parts
        room, name = (f"{parts[0]}/", parts[1]) if len(parts) > 1 else ("", parts[0])
        rooms.setdefault(room, set()).add(f"{name}/" if len(parts) > 2 else name)
    for room, names in rooms.items():
        assert listed(room) == names - {"__init__.py", "__main__.py"}, f"dfq/{room}"


def test_the_architecture_page_has_the_rules_of_imports() -> None:
    section = ARCHITECTURE.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", section, re.M)
    said = {room: set(re.findall(r"`(\w+)`", names)) - {"dfq"} for room, names in rows}
    assert said == MAY


def test_every_error_is_in_the_hierarchys_drawing() -> None:
    import dfq.errors as errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.DfqError):
            assert name in (errors.__doc__ or "")


KERNELS = re.compile(
    r"^from (dfq\.(runtime|exporting|benchmarking|inversion\.(integer|frozen))|exporting)\b"
    r"|compiled=True",
    re.MULTILINE,
)
"""Imports that mark tests of kernels, exports, compiled models and benchmarks."""


def test_what_depends_on_the_processor_is_tested_as_on_the_oldest() -> None:
    oldest = (ROOT / ".ci" / "run").read_text().rpartition("ONEDNN_MAX_CPU_ISA=AVX2")[2]
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if not path.name.startswith("test_docs") and KERNELS.search(path.read_text()):
            assert f"tests/{path.name}" in oldest
