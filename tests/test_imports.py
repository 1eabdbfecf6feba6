"""Data flows one way, and so do imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {
    "_version",
    "argument_names",
    "arguments",
    "bars",
    "cache",
    "catalog",
    "device",
    "environment",
    "errors",
    "extras",
    "failures",
    "files",
    "installation",
    "inversion.losses",
    "inversion.registry",
    "inversion.schedules",
    "job",
    "ownership",
    "process_state",
    "progress",
    "recipe",
    "recipe_files",
    "sparse",
    "text",
    "timing",
    "validation",
}
"""Modules that every room may import, and that import none of the rooms.  Methods and losses are
among them, as recipes take their fields."""

MAY = {
    "demo": set(),
    "results": set(),
    "vit": {"demo"},
    "runtime": set(),
    "data": {"vit", "demo"},
    "inversion": {"vit", "runtime"},
    "quantization": {"vit", "runtime", "results"},
    "checkpoint": {"vit", "runtime", "quantization"},
    "slow": {"runtime"},
    "distillation": {"vit", "inversion", "demo"},
    "exporting": {"vit", "runtime", "quantization", "checkpoint", "results"},
    "engines": {"vit", "runtime", "quantization", "checkpoint", "exporting", "slow"},
    "benchmarking": {
        *("vit", "runtime", "quantization", "checkpoint", "results", "exporting", "engines"),
        *("demo", "slow"),
    },
    "pipeline": {
        *("vit", "runtime", "data", "inversion", "quantization", "checkpoint", "results"),
        *("distillation", "engines", "demo", "slow"),
    },
    "cli": {"results", "demo"},
}
"""Rooms of ``dfq``, and the rooms that each may import.  Inversion, data and quantization meet in
the pipeline alone."""


def modules(place: str = "dfq") -> dict[str, Path]:
    """Modules below ``place`` by their dotted name."""
    by_name = {}
    for path in sorted((ROOT / place).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        by_name[".".join(parts).removesuffix(".__init__")] = path
    return by_name


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def users_of(module: str, place: str = "dfq") -> set[str]:
    """Files below ``place`` that import a module or anything in it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in modules(place).values()
        if any(name == module or name.startswith(module + ".") for name in imported(path))
    }


def room(module: str) -> str:
    """``dfq.vit.load`` -> ``vit``; ``dfq`` itself is the empty name."""
    parts = module.removeprefix("dfq").removeprefix(".").split(".")
    inner = ".".join(parts[:2])
    return inner if inner in BASE else parts[0]


def edges() -> set[tuple[str, str]]:
    """Which module of ``dfq`` imports which."""
    known = modules()
    return {
        (module, name if name in known else name.rpartition(".")[0])
        for module, path in known.items()
        for name in imported(path)
        if name in known or name.rpartition(".")[0] in known
    }


def test_every_module_is_in_a_known_room() -> None:
    assert {room(module) for module in modules()} <= {"", "__main__", *BASE, *MAY}


def test_rooms_import_what_is_below_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, name in edges()
        if room(module) not in ("", "__main__", room(name))
        and room(name) not in BASE
        and room(name) not in MAY.get(room(module), set())
        and room(name) != ""
    ]
    assert not wrong


def takes_from_the_package(path: Path) -> bool:
    """Whether a file imports ``dfq`` itself, or a name of it that is no module."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and any(alias.name == "dfq" for alias in node.names):
            return True
        names = node.names if isinstance(node, ast.ImportFrom) and node.module == "dfq" else ()
        if any(f"dfq.{alias.name}" not in known for alias in names):
            return True
    return False


def test_the_package_itself_is_imported_by_the_command_line_alone() -> None:
    users = {module for module, path in modules().items() if takes_from_the_package(path)}
    assert {room(module) for module in users} <= {"cli"}


def test_rooms_form_no_cycle() -> None:
    order: list[str] = []
    rest = dict(MAY)
    while rest:
        free = [name for name, below in rest.items() if below <= set(order)]
        assert free, f"a cycle among {sorted(rest)}"
        order += free
        rest = {name: below for name, below in rest.items() if name not in free}


def test_modules_form_no_cycle() -> None:
    below: dict[str, set[str]] = {module: set() for module in modules()}
    for module, name in edges():
        if module != name and not module.startswith(name + ".") and module != "dfq":
            below[module].add(name)
    while below:
        free = {module for module, names in below.items() if not names & set(below)}
        assert free, f"a cycle among {sorted(below)}"
        below = {module: names for module, names in below.items() if module not in free}


def test_torch_ao_stays_in_one_module() -> None:
    assert users_of("torch.ao") == {"dfq/quantization/observers.py"}


def test_the_command_line_is_imported_by_nothing_but_its_entry() -> None:
    users = {name for name in users_of("dfq.cli") if not name.startswith("dfq/cli/")}
    assert users == {"dfq/__main__.py"}


def test_only_the_command_line_prints() -> None:
    assert all(name.startswith("dfq/cli/") for name in users_of("dfq.cli.terminal"))
    assert users_of("dfq.cli.errors") == {"dfq/cli/app.py"}


BENCH_TAKES = {
    *("cli", "data", "demo", "device", "environment", "errors", "failures", "files", "inversion"),
    *(
        "installation",
        "pipeline",
        "quantization",
        "recipe",
        "results",
        "runtime",
        "sparse",
        "text",
        "vit",
    ),
}
"""Rooms of ``dfq`` that ``calibration_bench`` takes from, beside the public names."""


def test_the_bench_takes_from_stated_rooms() -> None:
    names = {name for path in modules("calibration_bench").values() for name in imported(path)}
    known = modules()
    taken = {room(name).partition(".")[0] for name in names if name in known and name != "dfq"}
    assert taken <= BENCH_TAKES


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("dfq", ("torch", "timm", "pydantic")),
        ("dfq.cli.interrupts", ("torch", "timm", "pydantic")),
        ("dfq.recipe", ("torch", "timm", "numpy")),
    ],
)
def test_light_modules_do_not_load_heavy_ones(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
