"""Which of timm's models dfq supports, found by building each without weights.

With another timm, or when dfq supports more: ``python tests/catalog.py > dfq/models.json``.  It
takes a minute or two.
"""

from __future__ import annotations

import json
import re

import timm
import torch

from dfq.catalog import TIMM_FAMILIES
from dfq.errors import UnsupportedModelError
from dfq.vit.describe import describe


def timm_names() -> list[str]:
    """Names of timm's modules of patch transformers, without pretrained tags."""
    return sorted({name for home in TIMM_FAMILIES for name in timm.list_models(module=home)})


def refusal(name: str) -> str | None:
    """Return in a few words why a model is refused; None if it is supported."""
    try:
        with torch.device("meta"):
            describe(timm.create_model(name), name)
    except UnsupportedModelError as error:
        return re.sub(r"^its (\S+) is (?:\w+\.)*(\w+), not .*", r"\1 is \2", error.reason)
    return None


def main() -> None:
    """Print the catalog."""
    refusals = {name: refusal(name) for name in timm_names()}
    catalog = {
        "timm": timm.__version__,
        "refused": {name: reason for name, reason in refusals.items() if reason is not None},
        "supported": [name for name, reason in refusals.items() if reason is None],
    }
    print(json.dumps(catalog, indent=1))


if __name__ == "__main__":
    main()
