"""The stored catalog of timm's models, compared with the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from catalog import refusal, timm_names

import dfq
from dfq.catalog import read_catalog

ROOT = Path(__file__).parents[1]
CATALOG = read_catalog()

SAMPLE = [
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "test_vit", "test_vit2"),
    *("vit_small_patch14_reg4_dinov2", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("vit_base_patch16_siglip_224", "vit_small_patch16_dinov3", "test_vit4"),
    *("vit_base_patch16_rpn_224", "vit_small_patch16_18x2_224", "aimv2_large_patch14_224"),
    *("vit_small_patch16_rope_mixed_224", "vit_dwee_patch16_reg1_gap_256"),
    *("vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"),
]
"""Every family and every kind of refusal, of small models."""


@pytest.mark.parametrize("name", SAMPLE)
def test_a_stored_mark_is_what_the_model_says(name: str) -> None:
    """``python tests/catalog.py`` does the same for all names."""
    assert CATALOG.refused.get(name) == refusal(name)
    assert CATALOG.supports(name) == (refusal(name) is None)


def test_the_sample_has_every_kind_of_refusal() -> None:
    kinds = {reason.rpartition(" ")[2] for reason in CATALOG.refused.values()}
    small = {CATALOG.refused[name].rpartition(" ")[2] for name in SAMPLE if name in CATALOG.refused}
    assert kinds - small == {"EvaBlockPostNorm"}  # of one model, with 4 billion parameters


@pytest.mark.skipif(timm.__version__ != CATALOG.timm, reason="another timm than the catalog's")
def test_the_catalog_has_all_of_timms_names() -> None:
    assert sorted([*CATALOG.supported, *CATALOG.refused]) == timm_names()


def test_documentation_has_the_numbers_of_the_catalog() -> None:
    supported = len(CATALOG.supported)
    names = supported + len(CATALOG.refused)
    assert f"Of the {names} names" in (ROOT / "docs" / "models.md").read_text()
    assert f"{supported} are of supported structure" in (ROOT / "docs" / "models.md").read_text()
    assert f"{supported} of the {names} names" in (ROOT / "README.md").read_text()


def test_models_are_marked() -> None:
    marks = {entry.name: entry for entry in dfq.models()}
    assert marks["demo"].supported
    assert marks["vit_base"].supported
    assert marks["deit_tiny_patch16_224"].supported
    refused = marks["vit_base_patch16_rpn_224"]
    assert (refused.supported, refused.reason) == (False, "blocks.0 is ResPostBlock")


def test_names_of_another_timm_have_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.list_models", lambda **_: ["vit_of_tomorrow"])
    monkeypatch.setattr("timm.is_model_pretrained", lambda _: False)
    entry = dfq.models("tomorrow")[0]
    assert (entry.supported, entry.reason) == (None, None)
