"""Cost of inversion on many models."""

from __future__ import annotations

from pathlib import Path

import pytest
from silent import Silent

from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.experiments.across_models.experiment import MODELS, Options
from calibration_bench.experiments.across_models.tables import model_plots, model_tables
from dfq.errors import SettingError

EXPERIMENT = registry.entry("across-models")
SMALL = Options(
    models="demo,test_vit@32",
    methods="dmi,pri2",
    unit_size=1,
    iterations=8,
    iterations_per_stage=2,
    precision="float32",
    threads=1,
)


def test_every_model_and_method_is_a_row(tmp_path: Path) -> None:
    outcome = run(EXPERIMENT, SMALL, tmp_path, Silent())
    rows = {(r["model"], r["method"]): r for r in outcome["rows"]}
    assert len(rows) == 4
    pri, dmi = rows["demo", "pri2"], rows["demo", "dmi"]
    assert pri["patches"] == 196
    assert pri["updates_per_image"] == 4 * (196 + 98) / 2
    assert dmi["updates_per_image"] == 8 * 196
    assert [s["live"] for s in pri["stages"]] == [196, 98]
    assert 0 < pri["seconds_per_image"] < dmi["seconds_per_image"]
    (table,) = outcome["tables"]
    assert [r["model"] for r in table["rows"]] == ["demo", "test_vit@32"]
    assert table["rows"][0]["pri2_faster"].endswith("x (2.7x)")
    assert table["rows"][1]["millions"] == pytest.approx(
        rows["test_vit@32", "dmi"]["parameters"] / 1e6
    )


def test_a_model_without_a_baseline_has_no_ratio() -> None:
    row = {
        "iterations": 8, "batch": 1, "precision": "float32", "threads": 1, "device": "cpu",
        "model": "m", "patches": 16, "pool": "token", "importance": "attention", "depth": 2,
        "width": 8, "parameters": 5e6, "spread": 0.1, "method": "pri2", "seconds_per_image": 2.0,
        "updates_per_image": 3.0,
    }  # fmt: skip
    (table,) = model_tables([row])
    assert table.rows[0]["pri2_seconds"] == 2
    assert "pri2_faster" not in table.rows[0]
    (plot,) = model_plots([row])
    assert (list(plot.curves[0].x), list(plot.curves[0].y)) == ([5.0], [2.0])


def test_all_kinds_of_models_are_in_the_default() -> None:
    kinds = ("demo", "base", "distilled", "dinov2", "siglip", "beit", "eva02")
    assert all(any(kind in model for model in MODELS) for kind in kinds)


def test_settings_are_checked_before_work(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="iterations-per-stage"):
        run(EXPERIMENT, Options(iterations_per_stage=1), tmp_path, Silent())
