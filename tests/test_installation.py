"""Install commands fit how this copy was installed."""

from __future__ import annotations

import json
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dfq import installation
from dfq.installation import DISTRIBUTION, EXTRAS, install_command

ROOT = Path(__file__).parents[1]


class Installed(metadata.Distribution):
    """Metadata in ``place``, as an installer writes it."""

    def __init__(self, place: Path, origin: dict[str, Any] | None, wheel: bool = True) -> None:
        self.place = place
        self.texts = {"direct_url.json": None if origin is None else json.dumps(origin)}
        self.texts["WHEEL"] = "Wheel-Version: 1.0" if wheel else None

    def read_text(self, filename: str) -> str | None:
        return self.texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return self.place / path


def command(monkeypatch: pytest.MonkeyPatch, *copies: Installed, extra: str = "onnx") -> str:
    monkeypatch.setattr(metadata, "distributions", lambda name: [*copies] if name else [])
    return install_command(extra)


PACKAGES = "pip install 'onnx>=1.17' 'onnxruntime>=1.20'"
VCS = {"vcs": "git", "commit_id": "0123abc", "requested_revision": "main"}


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, "pip install 'dfq-vit[onnx]'"),
        (
            {"url": "https://x.org/d.whl", "archive_info": {}},
            "pip install 'dfq-vit[onnx] @ https://x.org/d.whl'",
        ),
        (
            {"url": "https://x.org/d.git", "vcs_info": VCS},
            "pip install 'dfq-vit[onnx] @ git+https://x.org/d.git@0123abc'",
        ),
        (
            {"url": "https://x.org/d.git", "vcs_info": VCS, "subdirectory": "sub"},
            "pip install 'dfq-vit[onnx] @ git+https://x.org/d.git@0123abc#subdirectory=sub'",
        ),
        ({"url": "file:///no/where", "dir_info": {}}, PACKAGES),
        ({"url": "file:///no/where.whl", "archive_info": {}}, PACKAGES),
    ],
    ids=["index", "archive", "git", "subdirectory", "directory gone", "wheel gone"],
)
def test_the_origin_decides(
    origin: dict[str, Any] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, Installed(ROOT, origin)) == expected


def test_a_directory_is_installed_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editable = {"url": ROOT.as_uri(), "dir_info": {"editable": True}}
    assert command(monkeypatch, Installed(tmp_path, editable), extra="benchmark") == (
        f"pip install -e '{ROOT}[benchmark]'"
    )
    place = tmp_path / "a b"
    place.mkdir()
    copied = {"url": place.as_uri(), "dir_info": {}}
    assert command(monkeypatch, Installed(ROOT, copied)) == f"pip install '{place}[onnx]'"


def test_sources_that_are_not_installed_need_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = Installed(tmp_path, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    built = Installed(ROOT, None, wheel=False)  # egg-info beside the sources
    assert command(monkeypatch) == PACKAGES
    assert command(monkeypatch, another, built) == PACKAGES


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        required: set[str] = set()
        for requirement in extras[extra]:
            name, bracket, others = requirement.partition("[")
            if bracket:
                assert name == DISTRIBUTION
                required.update(*(packages(other) for other in others.rstrip("]").split(",")))
            else:
                required.add(requirement)
        return required

    assert project["name"] == DISTRIBUTION
    assert {extra: packages(extra) for extra in extras if extra != "test"} == {
        extra: set(requirements) for extra, requirements in EXTRAS.items()
    }


def test_install_commands_are_made_in_one_place() -> None:
    own = Path(installation.__file__)
    code = [p for place in ("dfq", "calibration_bench") for p in (ROOT / place).rglob("*.py")]
    pages = [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "calibration_bench/README.md",
    ]
    for path in [*code, *pages]:
        content = path.read_text()
        assert "dfq[" not in content, f"{path}: dfq is another project's name on the index"
        if path in code and path != own:
            assert "pip install" not in content, path
