"""Accuracy by calibration source and by variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration_bench import registry
from calibration_bench.experiments.quantization_accuracy import VARIANTS, Options, _settings
from calibration_bench.runner import run
from dfq import QuantizationSettings
from dfq.errors import SettingError

MODEL = "test_vit"
ACCURACY = registry.entry("quantization-accuracy")


class Notes:
    def note(self, text: str) -> None:
        pass


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": MODEL,
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "sources": "pri2,noise,real",
        "real": str(data),
        "variants": "default,plain",
        "iterations": 2,
        "seeds": "3",
        "images": 4,
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_every_source_variant_and_width_is_a_row(
    tmp_path: Path, small_weights: Path, labelled_npz: Path
) -> None:
    found = run(ACCURACY, small(small_weights, labelled_npz), tmp_path, Notes())
    rows = found["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {r["source"] for r in rows} == {"pri2", "noise", "real"}
    assert all(0 <= r["agreement"] <= 1 and r["kl"] >= 0 for r in rows)
    by = {(r["source"], r["variant"], r["bits"]): r for r in rows}
    for source in ("pri2", "noise", "real"):
        assert by[source, "default", 8]["kl"] < by[source, "plain", 4]["kl"]
        assert by[source, "default", 8]["scheme"] == "w8a8"
    (table,) = found["tables"]
    assert len(table["rows"]) == 12


def test_real_images_must_be_named(tmp_path: Path, small_weights: Path, labelled_npz: Path) -> None:
    with pytest.raises(SettingError, match="--real"):
        run(ACCURACY, small(small_weights, labelled_npz, real=None), tmp_path, Notes())


def test_variants_differ_and_the_last_ingredient_is_the_one_missing() -> None:
    key = {"bits": 4, "attention": "float", "source": "pri4"}
    last = [name for name in VARIANTS if name.startswith("plain+")][-1]
    assert _settings({**key, "variant": last}) == QuantizationSettings(bits=4, fractal=0)
    assert _settings({**key, "variant": "plain"}).rounding == "nearest"
    changed = [_settings({**key, "variant": name}) for name in VARIANTS]
    assert len(set(changed)) == len(VARIANTS) - 1
    real = _settings({**key, "source": "real", "variant": "default"})
    assert real == QuantizationSettings(bits=4, smooth=(), fractal=0)
