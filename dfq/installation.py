"""How this copy of dfq was installed, and so how its optional packages are."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "dfq-vit"
"""Name on the package index, where ``dfq`` is another project."""

EXTRAS = {
    "report": ("matplotlib>=3.8",),
    "onnx": ("onnx>=1.17", "onnxruntime>=1.20"),
    "openvino": ("onnx>=1.17", "openvino>=2025.0"),
    "benchmark": (
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "openvino>=2025.0",
        "nncf>=2.15",
        "torchao>=0.15",
    ),
}
"""Requirements of each extra for users, as pyproject.toml has them."""


def install_command(extra: str) -> str:
    """The shell command that adds an extra to this copy, wherever it came from (PEP 610)."""
    words = _requirement(extra, _installed(Path(__file__).parent))
    return " ".join(["pip", "install", *map(shlex.quote, words)])


def _requirement(extra: str, installed: metadata.Distribution | None) -> list[str]:
    """Arguments of ``pip install``; the packages themselves where the origin is not known."""
    if installed is None:
        return list(EXTRAS[extra])
    origin = _origin(installed)
    if origin is None:
        return [f"{DISTRIBUTION}[{extra}]"]
    url, path = origin["url"], _local_path(origin["url"])
    if path is not None and not path.exists():
        return list(EXTRAS[extra])
    if path is not None and "dir_info" in origin:
        editable = bool(origin["dir_info"].get("editable"))
        return [*(["-e"] if editable else []), f"{path}[{extra}]"]
    vcs = origin.get("vcs_info")
    if vcs is not None:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    if "subdirectory" in origin:
        url += f"#subdirectory={origin['subdirectory']}"
    return [f"{DISTRIBUTION}[{extra}] @ {url}"]


def _installed(package: Path) -> metadata.Distribution | None:
    """The distribution whose modules are those in ``package``; None if they are not installed.

    Builds leave metadata beside the sources too, which does not make them installed.
    """
    for found in metadata.distributions(name=DISTRIBUTION):
        if found.read_text("WHEEL") is not None and package.resolve() in _packages(found):
            return found
    return None


def _packages(installed: metadata.Distribution) -> list[Path]:
    """Where a distribution's package may lie: beside its metadata, or in an editable directory."""
    places = [Path(str(installed.locate_file("")))]
    origin = _origin(installed)
    if origin is not None and origin.get("dir_info", {}).get("editable"):
        places += filter(None, [_local_path(origin["url"])])
    return [place.resolve() / "dfq" for place in places]


def _origin(installed: metadata.Distribution) -> dict[str, Any] | None:
    """What ``direct_url.json`` says; None of what came from an index."""
    text = installed.read_text("direct_url.json")
    return None if text is None else json.loads(text)


def _local_path(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None
