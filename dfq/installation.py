"""Detection of how dfq was installed, for commands that install optional packages."""

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
    "benchmark": ("onnx>=1.17", "onnxruntime>=1.20", "openvino>=2025.0", "nncf>=2.15"),
}
"""Requirements of each extra, as in pyproject.toml."""


def install_command(extra: str) -> str:
    """Return the shell command that installs an extra, wherever dfq came from (PEP 610)."""
    words = _requirement(extra, _installed(Path(__file__).parent))
    return " ".join(["pip", "install", *map(shlex.quote, words)])


def _requirement(extra: str, installed: metadata.Distribution | None) -> list[str]:
    """Return arguments of ``pip install``; the packages themselves if the origin is unknown."""
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
    """Return the distribution whose modules are in ``package``; None if they are not installed.

    Builds leave metadata beside the sources too, which does not make them installed.
    """
    for distribution in metadata.distributions(name=DISTRIBUTION):
        if distribution.read_text("WHEEL") is not None and package.resolve() in _packages(
            distribution
        ):
            return distribution
    return None


def _packages(installed: metadata.Distribution) -> list[Path]:
    """Return where a distribution's package may be: beside its metadata, or editable."""
    places = [Path(str(installed.locate_file("")))]
    origin = _origin(installed)
    if origin is not None and origin.get("dir_info", {}).get("editable"):
        places += filter(None, [_local_path(origin["url"])])
    return [place.resolve() / "dfq" for place in places]


def _origin(installed: metadata.Distribution) -> dict[str, Any] | None:
    """Return the content of ``direct_url.json``; None for a package from an index."""
    text = installed.read_text("direct_url.json")
    return None if text is None else json.loads(text)


def _local_path(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None
