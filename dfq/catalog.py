"""Names of models, and which of timm's dfq supports, known without loading timm."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("models.json")
"""List of the models, written by ``python tests/catalog.py``, which builds each without weights."""

TIMM_FAMILIES = ("vision_transformer", "deit", "beit", "eva")
"""Modules of timm that define models which may be supported."""

ALIASES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
}


@dataclass(frozen=True)
class Catalog:
    """Names of the modules :data:`TIMM_FAMILIES` of one timm version.

    ``refused``: the reason by name; ``timm``: the version.
    """

    timm: str
    supported: frozenset[str]
    refused: dict[str, str]

    def supports(self, name: str) -> bool | None:
        """Whether a model is supported; None for a name of another timm version."""
        if name in self.supported:
            return True
        return False if name in self.refused else None


@functools.cache
def read_catalog() -> Catalog:
    """Read the catalog that ships with dfq."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return Catalog(content["timm"], frozenset(content["supported"]), content["refused"])


def known_names() -> list[str]:
    """Names that can be given as MODEL: the demo, aliases and timm's supported names."""
    return ["demo", *ALIASES, *sorted(read_catalog().supported)]
