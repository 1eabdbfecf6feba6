"""Accuracy by calibration source and by variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration_bench.core import registry
from calibration_bench.core.records import Store
from calibration_bench.core.runner import run
from calibration_bench.experiments.quantization_accuracy.experiment import (
    VARIANTS,
    Options,
    _settings,
)
from dfq import QuantizationSettings
from dfq.errors import DataError, SettingError

MODEL = "test_vit"
ACCURACY = registry.entry("quantization-accuracy")


class Notes:
    def note(self, text: str) -> None:
        pass


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Images of the same size as ``labeled_npz``, but different."""
    path = tmp_path / "others.npz"
    x = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(8, dtype=np.uint8) % 5)
    return path


def small(weights: Path, data: Path, real: Path | None, **changes: Any) -> Options:
    options = {
        "model": MODEL,
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "sources": "pri2,noise,real",
        "real": None if real is None else str(real),
        "variants": "default,plain",
        "iterations": 2,
        "seeds": "3",
        "images": 4,
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_every_source_variant_and_width_is_a_row(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, others: Path
) -> None:
    outcome = run(ACCURACY, small(small_weights, labeled_npz, others), tmp_path, Notes())
    rows = outcome["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {r["source"] for r in rows} == {"pri2", "noise", "real"}
    assert all(0 <= r["agreement"] <= 1 and r["kl"] >= 0 for r in rows)
    by = {(r["source"], r["variant"], r["bits"]): r for r in rows}
    for source in ("pri2", "noise", "real"):
        assert by[source, "default", 8]["kl"] < by[source, "plain", 4]["kl"]
        assert by[source, "default", 8]["scheme"] == "w8a8"
    (table,) = outcome["tables"]
    assert len(table["rows"]) == 12


def test_real_images_must_be_named(tmp_path: Path, small_weights: Path, labeled_npz: Path) -> None:
    with pytest.raises(SettingError, match="--real"):
        run(ACCURACY, small(small_weights, labeled_npz, None), tmp_path, Notes())


def test_images_that_are_tested_on_are_no_calibration_set(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    options = small(small_weights, labeled_npz, labeled_npz)
    with pytest.raises(DataError, match=r"images of 'images\.npz', on which"):
        run(ACCURACY, options, tmp_path, Notes())


def test_other_images_or_another_effort_are_other_rows(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, others: Path
) -> None:
    changes: dict[str, Any] = {"variants": "plain", "bits": "8", "sources": "pri2,real"}
    first = small(small_weights, labeled_npz, others, **changes)
    kept = {row["real"] for row in run(ACCURACY, first, tmp_path, Notes())["rows"]}
    with np.load(others) as arrays:
        np.savez(others, x=arrays["x"][::-1], y=arrays["y"])
    again = dataclasses.replace(first, iterations=3)
    outcome = run(ACCURACY, again, tmp_path, Notes())
    assert {row["real"] for row in outcome["rows"]} & kept == {None}
    store = Store(tmp_path, ACCURACY.name)
    assert len(store.rows()) == 4
    (table,) = ACCURACY.load().tables(store.rows())
    inverted = [row for row in table.rows if row["source"] == "pri2"]
    assert {row["iterations"]: row["seeds"] for row in inverted} == {2: 1, 3: 1}


def test_variants_differ_and_the_last_ingredient_is_the_one_missing() -> None:
    key = {"bits": 4, "attention": "float", "source": "pri4", "reduce_range": True}
    last = [name for name in VARIANTS if name.startswith("plain+")][-1]
    assert _settings({**key, "variant": last}) == QuantizationSettings(bits=4, fractal=0)
    assert _settings({**key, "variant": "plain"}).rounding == "nearest"
    changed = [_settings({**key, "variant": name}) for name in VARIANTS]
    assert len(set(changed)) == len(VARIANTS) - 1
    real = _settings({**key, "source": "real", "variant": "default"})
    assert real == QuantizationSettings(bits=4, smooth=(), fractal=0)
